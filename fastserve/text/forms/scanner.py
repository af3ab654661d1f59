"""Reads text that comes in pieces, for parsers that are written as if they had all of it.

A parser is a generator. Where it needs more text than there is, it is suspended until `feed` or `end` brings some. All
decisions depend on the text alone, never on its pieces: a primitive waits until no further text could change it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

ResultT = TypeVar("ResultT")
Steps = Generator[None, None, ResultT]
"""A parser that returns a result; it yields where it waits for more text."""

MAX_HELD_CHARS = 65_536
"""Text that may begin a call is held back up to this length. Longer ones are text."""
_SPACE = re.compile(r"[ \t\r\n]*")


class NotACallError(Exception):
    """The text since `Scanner.hold` is no call."""


class Scanner:
    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        """Index of the next character in `text`."""
        self.held_from: int | None = None
        """Start of the text that is kept for `held`; None: nothing is."""
        self._ended = False

    def feed(self, text: str) -> None:
        begin = self.at if self.held_from is None else self.held_from
        self.text = self.text[begin:] + text
        self.at -= begin
        if self.held_from is not None:
            self.held_from = 0

    def close(self) -> None:
        """No more text comes."""
        self._ended = True

    def hold(self) -> None:
        """Keep the text from here on, until `release`."""
        self.held_from = self.at

    def release(self) -> None:
        self.held_from = None

    @property
    def limit(self) -> int:
        """Index after the last character that may be looked at."""
        if self.held_from is None:
            return len(self.text)
        return min(len(self.text), self.held_from + MAX_HELD_CHARS)

    def more(self) -> Steps[bool]:
        """Wait for text after `limit`; return whether there is some. Raises NotACallError if too much is held."""
        known = self.limit - self.at
        while self.limit - self.at == known:
            if self.held_from is not None and self.limit == self.held_from + MAX_HELD_CHARS:
                raise NotACallError
            if self._ended:
                return False
            yield
        return True

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while self.at >= self.limit:
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def take_space(self) -> Steps[str]:
        """Take whitespace."""
        return (yield from self.take_run(_SPACE))

    def take_run(self, pattern: re.Pattern[str], max_chars: int = MAX_HELD_CHARS) -> Steps[str]:
        """Take the characters that match `pattern`, which is a repeated set of characters, up to `max_chars`."""
        taken = ""
        while True:
            found = pattern.match(self.text, self.at, min(self.limit, self.at + max_chars - len(taken)))
            assert found is not None
            taken += found[0]
            self.at = found.end()
            if self.at < self.limit or len(taken) >= max_chars or not (yield from self.more()):
                return taken

    def take(self, *marks: str) -> Steps[str]:
        """Take one of `marks`, the longest if several match; return it, or an empty string if none is next."""
        longest = max(map(len, marks), default=0)
        while True:
            known = self.text[self.at : min(self.limit, self.at + longest)]
            undecided = any(len(mark) > len(known) and mark.startswith(known) for mark in marks)
            if undecided and (yield from self.more()):
                continue
            found = max((mark for mark in marks if known.startswith(mark)), key=len, default="")
            self.at += len(found)
            return found

    def ends_within(self, *marks: str) -> Steps[bool]:
        """Whether the text ends here with the beginning of one of `marks`, which is taken."""
        longest = max(map(len, marks), default=0)
        while True:
            known = self.text[self.at : min(self.limit, self.at + longest)]
            if not any(len(mark) > len(known) and mark.startswith(known) for mark in marks):
                return False
            if not (yield from self.more()):
                self.at += len(known)
                return bool(known)

    def need(self, *marks: str) -> Steps[str]:
        """Take one of `marks`. Raises NotACallError if none is next."""
        found = yield from self.take(*marks)
        if not found:
            raise NotACallError
        return found

    def take_until(self, marks: tuple[str, ...], write: Callable[[str], None]) -> Steps[str]:
        """Write the text before the first of `marks`, in pieces; return that mark without taking it, or an empty string
        at the end. No mark may begin another one.
        """
        pattern, beginnings = _search_of(marks)
        while True:
            end = self.limit
            found = pattern.search(self.text, self.at, end) if marks else None
            if found is not None:
                write(self.text[self.at : found.start()])
                self.at = found.start()
                return found[0]
            kept = beginnings.search(self.text, max(self.at, end - max(map(len, marks), default=0)), end)
            safe = end if kept is None else kept.start()
            if safe > self.at:
                write(self.text[self.at : safe])
                self.at = safe
            if not (yield from self.more()):
                write(self.text[self.at :])
                self.at = len(self.text)
                return ""


@lru_cache(maxsize=512)
def _search_of(marks: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of the marks, and of an end of text that may become one."""
    beginnings = {mark[:size] for mark in marks for size in range(1, len(mark))}
    ends = "|".join(re.escape(text) for text in sorted(beginnings, key=len, reverse=True))
    whole = "|".join(re.escape(mark) for mark in marks)
    return re.compile(whole or r"(?!)"), re.compile(rf"(?:{ends})\Z" if ends else r"(?!)")
