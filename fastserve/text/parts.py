"""The typed parts of an answer, and the parsers that turn a model's text into them.

A stream of parts is a stream of pieces: those of one type that follow each other belong together. A new type of part is
a subclass of `Part`; a parser that makes it is a class with `push` and `finish`; and each form of answer that can show
it maps the type to its own fields (`worker/writers/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec


class Part(msgspec.Struct, frozen=True):
    """A piece of an answer. Its type says what it is a piece of."""


class TextPart(Part, frozen=True):
    """Text for the reader: the content of a message."""

    text: str


class PartParser(Protocol):
    """Turns the text of one choice into parts, piece by piece.

    However the text is cut into pieces, the parts must join to the same parts. A parser never raises for what a model
    wrote: text that it cannot make sense of is a TextPart.
    """

    def push(self, text: str) -> list[Part]:
        """Take more text; return the parts that are certain now."""
        ...

    def finish(self) -> list[Part]:
        """The text has ended, perhaps in the middle of a part: return what was held back."""
        ...


class TextParser:
    """All text is TextPart."""

    def push(self, text: str) -> list[Part]:
        return [TextPart(text)] if text else []

    def finish(self) -> list[Part]:
        return []


ParserFactory = Callable[[], PartParser]
"""Makes the parser of one choice."""


def plain_text(parts: Sequence[Part]) -> str:
    """The text of parts, for forms of answer that have no place for anything else. Raises TypeError for other parts."""
    pieces = []
    for part in parts:
        if not isinstance(part, TextPart):
            raise TypeError(f"this form of answer has no place for a {type(part).__name__}")
        pieces.append(part.text)
    return "".join(pieces)
