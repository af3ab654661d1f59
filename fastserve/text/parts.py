"""The typed parts of an answer, and the parsers that turn a model's text into them.

A stream of parts is incremental: successive parts of one type belong together. A new type of part needs a subclass of
`Part`, a parser that makes it (`PartParser`), and its fields in each answer format that supports it
(`worker/writers/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec


class Part(msgspec.Struct, frozen=True):
    """A piece of an answer, of the kind that its type stands for."""


class TextPart(Part, frozen=True):
    """Text of the answer: the `content` of a message."""

    text: str


class ReasoningPart(Part, frozen=True):
    """Text that the model wrote while it was thinking, without the marks around it."""

    text: str


class ToolCallPart(Part, frozen=True):
    """A piece of a tool call. The first piece of a call has its id and name, the others only more of its arguments.

    Calls never interleave: the pieces of one call are complete before the next call begins.
    """

    index: int
    """Number of the call in its choice, from 0."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    """The next characters of the arguments' JSON. All of a call's are an object; of a call without arguments `{}`."""


class PartParser(Protocol):
    """Parses the text of one choice into parts, incrementally.

    The joined parts must not depend on how the text is chunked. A parser never raises for malformed output of a model:
    it returns it as TextPart.
    """

    def push(self, text: str) -> list[Part]:
        """Add text; return the parts that are complete or cannot change any more."""
        ...

    def finish(self, *, cut_off: bool) -> list[Part]:
        """The text has ended, perhaps inside a part: return what was held back. `cut_off`: the model would have gone
        on, so an unfinished part is not completed.
        """
        ...

    @property
    def is_reasoning(self) -> bool:
        """Whether the text ends inside reasoning."""
        ...

    @property
    def has_calls(self) -> bool:
        """Whether the answer has tool calls and, after its end, none of them was cut off."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing that follows would be part of the answer."""
        ...


class TextParser:
    """Returns all text as TextPart."""

    is_reasoning = False
    has_calls = False
    is_complete = False

    def __init__(self, choice: int = 0) -> None:
        """`choice`: see `ParserFactory`."""

    def push(self, text: str) -> list[Part]:
        return [TextPart(text)] if text else []

    def finish(self, *, cut_off: bool) -> list[Part]:
        return []


ParserFactory = Callable[[int], PartParser]
"""Makes the parser of the choice of an index."""


def joined(parts: Iterable[Part]) -> list[Part]:
    """Successive pieces of one text as one part."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, TextPart) and isinstance(last, TextPart):
            joined[-1] = TextPart(last.text + part.text)
        elif isinstance(part, ReasoningPart) and isinstance(last, ReasoningPart):
            joined[-1] = ReasoningPart(last.text + part.text)
        elif isinstance(part, ToolCallPart) and isinstance(last, ToolCallPart) and not part.name:
            joined[-1] = ToolCallPart(last.index, last.id, last.name, last.arguments + part.arguments)
        else:
            joined.append(part)
    return joined


def plain_text(parts: Sequence[Part]) -> str:
    """Join text parts, for answer formats without other types. Raises TypeError for a part of another type."""
    pieces = []
    for part in parts:
        if not isinstance(part, TextPart):
            raise TypeError(f"this answer format does not support {type(part).__name__}")
        pieces.append(part.text)
    return "".join(pieces)
