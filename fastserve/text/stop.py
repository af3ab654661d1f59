"""Stop strings: an answer ends at the first complete one, however the text is chunked.

Text that may be the beginning of a stop string is held back until it is decided. The first stop string is the one that
ends first; of several that end at the same character, the longest.

Special tokens are hidden from the answer, but a stop string may contain them: each string is searched in the text with
the names of special tokens, and in the text without them.

The search takes time linear in the text for each stop string, whatever they repeat (Knuth-Morris-Pratt).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: whether the answer contains the stop string."""
        if "" in stops:
            raise ValueError("an empty stop string would stop everything")
        self._searches = [_Search(stop, sees_hidden) for stop in stops for sees_hidden in (False, True)]
        self._include = include
        self._held: list[tuple[str, bool]] = []
        """Segments of text, each with whether it is hidden. No two visible ones are adjacent."""
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str, *, hidden: bool = False, may_stop: bool = True) -> str:
        """Add text; return the text that may be sent, which is empty once `stopped` is set.

        `hidden`: the text is the name of a special token, and only part of the answer as part of an included stop
        string. `may_stop`: whether a stop string that ends in this text counts.
        """
        if self.stopped is not None:
            return ""
        if not self._searches:
            return "" if hidden else text
        ends = [(search.feed(text, may_stop), search) for search in self._searches if search.sees_hidden or not hidden]
        found = [(end, -len(search.stop), search) for end, search in ends if end is not None]
        if found:
            end, _, search = min(found, key=lambda match: match[:2])
            self._hold(text[:end], hidden)
            self.stopped = search.stop
            text = self._release(self._num_visible(len(search.stop), search))
            self._held.clear()
            return text + search.stop if self._include else text
        self._hold(text, hidden)
        return self._release(max(self._num_visible(search.num_matched, search) for search in self._searches))

    def finish(self) -> str:
        """The text has ended: return what was held back."""
        return self._release(0)

    def _hold(self, text: str, hidden: bool) -> None:
        if self._held and not hidden and not self._held[-1][1]:
            text = self._held.pop()[0] + text
        self._held.append((text, hidden))

    def _num_visible(self, num_chars: int, search: _Search) -> int:
        """Visible characters among the last `num_chars` that `search` has seen."""
        if not search.sees_hidden:
            return num_chars
        num_visible = 0
        for text, hidden in reversed(self._held):
            num_visible += 0 if hidden else min(len(text), num_chars)
            num_chars -= min(len(text), num_chars)
        return num_visible

    def _release(self, num_kept: int) -> str:
        """Remove all but the last `num_kept` visible characters, and return them."""
        num_released = sum(len(text) for text, hidden in self._held if not hidden) - num_kept
        released = ""
        kept: list[tuple[str, bool]] = []
        for text, hidden in self._held:
            if hidden:
                kept += [(text, hidden)] if kept else []  # at the beginning it does not matter any more
                continue
            at = min(len(text), num_released - len(released))
            released += text[:at]
            kept += [(text[at:], hidden)] if at < len(text) else []
        self._held = kept
        return released


class _Search:
    """Incremental search for one string."""

    def __init__(self, stop: str, sees_hidden: bool) -> None:
        self.stop = stop
        self.sees_hidden = sees_hidden
        self.num_matched = 0
        """Length of the longest suffix of the text that is a prefix of the string."""

    def feed(self, text: str, may_stop: bool) -> int | None:
        """Search in the next text; return the index after the string's last character, or None.

        Without `may_stop`, complete strings are passed over.
        """
        stop, matched, at = self.stop, self.num_matched, 0
        while at < len(text):
            if not matched:
                at = text.find(stop[0], at)
                if at < 0:
                    break
            char = text[at]
            while matched and stop[matched] != char:
                matched = _borders(stop)[matched - 1]
            matched += stop[matched] == char
            at += 1
            if matched == len(stop):
                if may_stop:
                    return at
                matched = _borders(stop)[-1]
        self.num_matched = matched
        return None


@lru_cache(maxsize=256)
def _borders(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`: the length of its longest proper suffix that is also a prefix."""
    lengths = [0]
    for char in stop[1:]:
        length = lengths[-1]
        while length and stop[length] != char:
            length = lengths[length - 1]
        lengths.append(length + (stop[length] == char))
    return tuple(lengths)
