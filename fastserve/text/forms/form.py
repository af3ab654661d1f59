"""The contract of a form of tool calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastserve.text.forms.calls import Calls
from fastserve.text.forms.scanner import Steps


@dataclass(frozen=True)
class Function:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the arguments; empty: any object."""


Mark = Callable[[str], str]
"""Lark expression for a mark of a form."""
Value = Callable[[Mapping[str, Any]], str]
"""Lark expression for a JSON value of a schema."""


@dataclass(frozen=True)
class CallGrammar:
    """Rules of Lark for calls: `begin` CALL (`between` CALL)* `end`, where CALL is one of `calls`."""

    calls: Sequence[str]
    """An expression for the call of each function."""
    begin: str = '""'
    between: str = '""'
    end: str = '""'
    rules: Sequence[str] = ()
    """Further rules that the expressions use."""
    is_single: bool = False
    """Whether an answer has one call at most."""

    def lark(self, *, is_parallel: bool) -> str:
        call = " | ".join(f"call_{at}" for at in range(len(self.calls)))
        more = f" ({self.between} call)*" if is_parallel and not self.is_single else ""
        rules = [f"start: {self.begin} call{more} {self.end}", f"call: {call}"]
        rules += [f"call_{at}: {rule}" for at, rule in enumerate(self.calls)]
        return "\n".join([*rules, *self.rules]) + "\n"


class Form(ABC):
    """How the models of a family write calls. One object serves all answers: it has no state."""

    name: ClassVar[str]
    """Value of --tool-call-parser."""
    found_by: ClassVar[Sequence[Sequence[str]]]
    """Texts of a chat template by which it is recognized: all of one group are in it."""
    openers: ClassVar[tuple[str, ...]]
    """Marks that begin calls."""
    start_openers: ClassVar[tuple[str, ...]] = ()
    """Texts that begin calls only where the answer begins."""
    closers: ClassVar[tuple[str, ...]] = ()
    """Marks that end calls. They are no text where they follow a call."""
    inner_marks: ClassVar[tuple[str, ...]] = ()
    """Marks inside calls."""
    ends_reasoning: ClassVar[bool] = True
    """Whether a call may begin in unfinished reasoning. False where openers are common text, such as brackets."""
    id_length: ClassVar[int] = 0
    """Length of a call's id where models need an exact one; 0: `call_` and 24 characters."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, which must be visible where they are special tokens."""
        return (*self.openers, *self.start_openers, *self.closers, *self.inner_marks)

    @abstractmethod
    def read(self, opener: str, calls: Calls) -> Steps[None]:
        """Read the calls after `opener`, without the marks that close them. Raises NotACallError."""
        ...

    @abstractmethod
    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        """The grammar of calls of `functions`; None if they cannot be forced in this form."""
        ...
