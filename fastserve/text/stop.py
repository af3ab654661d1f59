"""Stop strings: the answer ends where the first of them is complete, wherever the chunks of text are cut.

Text that may be the beginning of a stop string is held back until it is decided. The first stop string is the one
whose last character comes first; of several that end there, the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string itself is part of the answer."""
        if "" in stops:
            raise ValueError("an empty stop string would stop everything")
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """Take more text; return what may be sent. Once `stopped` is set, nothing more comes."""
        if self.stopped is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.stopped = min(found)
            self._held = ""
            return text[: end if self._include else start]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The end of the text: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
