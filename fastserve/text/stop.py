"""Stop strings: an answer ends at the first complete one, however the text is chunked.

Text that may be the beginning of a stop string is held back until it is decided. The first stop string is the one that
ends first; of several that end at the same character, the longest.

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
        self._searches = [_Search(stop) for stop in stops]
        self._include = include
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """Add text; return the text that may be sent, which is empty once `stopped` is set."""
        if self.stopped is not None:
            return ""
        if not self._searches:
            return text
        before = len(self._held)
        found = [
            (before + end, before + end - len(search.stop), search.stop)
            for search in self._searches
            if (end := search.feed(text)) is not None
        ]
        text = self._held + text
        if found:
            end, start, self.stopped = min(found)
            self._held = ""
            return text[: end if self._include else start]
        keep = max(search.num_matched for search in self._searches)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text has ended: return what was held back."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Incremental search for one string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        """Length of the longest suffix of the text that is a prefix of the string."""

    def feed(self, text: str) -> int | None:
        """Search in the next text; return the index after the string's last character, or None."""
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
                return at
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
