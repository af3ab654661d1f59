"""Makes the parts of an answer: reasoning, text and tool calls.

What cannot be decided yet is held back: the beginning of a mark, whitespace (which belongs to a mark if one follows),
and a call up to its function's name. A call that is none after all is text, and so is what follows its opener.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.text.forms.calls import AnswerEndError, Calls
from fastserve.text.forms.form import Form
from fastserve.text.forms.scanner import NotACallError, Scanner, Steps
from fastserve.text.parts import Part, ReasoningPart, TextPart, joined
from fastserve.text.reasoning import NO_REASONING, ReasoningMarks

_MAX_REREAD_CHARS = 1024
"""A call that turns out to be text is read again after its opener, unless it was longer: reading stays linear."""
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class ParserOptions:
    """How the answers of one request are parsed."""

    form: Form | None = None
    """None: calls are text."""
    parameters: Mapping[str, Mapping[str, Any]] | None = None
    """Schemas of the arguments, by the names of the functions that may be called."""
    reasoning: ReasoningMarks = NO_REASONING
    starts_in_reasoning: bool = False
    """Whether the prompt has already opened the reasoning."""
    max_calls: int | None = None
    """Calls after which the answer ends."""
    includes_reasoning: bool = True


class AnswerParser:
    """Parses the answers of all families whose marks stand in plain text."""

    def __init__(self, options: ParserOptions, make_id: Callable[[int], str]) -> None:
        """`make_id`: makes the id of a call, by its number."""
        self._options = options
        self._form = options.form
        self._parts: list[Part] = []
        self._scan = Scanner()
        self._calls = Calls(self._scan, self._parts, options.parameters or {}, make_id, options.max_calls)
        self._is_cut_off = False
        """Whether the answer has ended within a call that the model would have gone on with."""
        self._is_reasoning = options.starts_in_reasoning
        self._num_calls_before_reasoning = 0
        self._space = ""
        """Whitespace that has not been written, because a mark may follow."""
        self._drops_space = options.starts_in_reasoning
        """Whether whitespace at the beginning of the next text belongs to the mark before it."""
        self._may_open = True
        """Whether reasoning may begin here: nothing but whitespace came since the start or the last call."""
        self._dropped: tuple[str, ...] = ()
        """Marks that are no text any more: the ends of what has ended otherwise."""
        self.is_complete = False
        """Whether the answer has all the calls that it may have. Further text is dropped."""
        self._steps = self._run()

    @property
    def is_reasoning(self) -> bool:
        return self._is_reasoning and self._calls.num_begun == self._num_calls_before_reasoning

    @property
    def has_calls(self) -> bool:
        return self._calls.num_begun > 0 and not self._is_cut_off

    def push(self, text: str) -> list[Part]:
        if text and not self.is_complete:
            self._scan.feed(text)
            self._advance()
        return self._take_parts()

    def finish(self, *, cut_off: bool) -> list[Part]:
        if not self.is_complete:
            self._scan.close()
            self._advance()
            self._is_cut_off = cut_off and self._calls.is_open
            if self._calls.closing is not None and not cut_off:
                self._calls.add(self._calls.closing)
            self.is_complete = True
        return self._take_parts()

    def _take_parts(self) -> list[Part]:
        parts = joined(self._parts)
        self._parts.clear()
        if not self._options.includes_reasoning:
            parts = [part for part in parts if not isinstance(part, ReasoningPart)]
        return parts

    def _advance(self) -> None:
        try:
            next(self._steps)
        except (StopIteration, AnswerEndError):
            self.is_complete = True

    def _run(self) -> Steps[None]:
        form, marks = self._form, self._options.reasoning
        openers = () if form is None else form.openers
        while True:
            if self._is_reasoning:
                stops = (*marks.ends, *(openers if form is not None and form.ends_reasoning else ()))
            else:
                if self._may_open and (yield from self._read_start()):
                    continue
                stops = (*openers, *marks.anywhere, *self._dropped)
            found = yield from self._scan.take_until(tuple(dict.fromkeys(stops)), self._write)
            if not found:
                break
            if found in openers and form is not None:
                yield from self._read_calls(form, found)
            else:
                self._scan.at += len(found)
                self._pass(found)
        if self._space and not self._may_open_after_call:
            self._put(self._space)

    @property
    def _may_open_after_call(self) -> bool:
        return self._may_open and self._calls.num_begun > 0

    def _read_start(self) -> Steps[bool]:
        """Read what may only stand at the start, if it is there."""
        self._write((yield from self._scan.take_space()))
        found = yield from self._scan.take(*self._options.reasoning.begins)
        if found:
            self._pass(found)
            return True
        form = self._form
        if form is not None and not self._calls.num_begun and form.start_openers:
            opener = yield from self._scan.take(*form.start_openers)
            if opener:
                self._scan.at -= len(opener)
                yield from self._read_calls(form, opener)
                return True
        return False

    def _pass(self, mark: str) -> None:
        """Pass a mark of reasoning, or one that is dropped."""
        marks = self._options.reasoning
        if self._is_reasoning:
            self._is_reasoning = False
            self._may_open = True
        elif mark in marks.begins or mark in marks.anywhere:
            if not self._may_open and self._space:
                self._put(self._space)
            self._is_reasoning = True
            self._num_calls_before_reasoning = self._calls.num_begun
        else:
            self._dropped = tuple(one for one in self._dropped if one != mark)
        self._space, self._drops_space = "", True

    def _read_calls(self, form: Form, opener: str) -> Steps[None]:
        scan, calls = self._scan, self._calls
        num_before = calls.num_begun
        scan.hold()
        scan.at += len(opener)
        try:
            yield from form.read(opener, calls)
        except NotACallError:
            calls.give_up()
            held = scan.at if scan.held_from is None else scan.held_from
            num_read = scan.at - held
            if calls.num_begun == num_before:
                scan.at = held + (len(opener) if num_read <= _MAX_REREAD_CHARS else num_read)
                text = scan.text[held : scan.at]
                scan.release()
                self._write(text)
                return
            scan.at = held
        scan.release()
        if calls.num_begun == num_before:
            return
        if self._is_reasoning:
            self._dropped = self._options.reasoning.ends
        self._is_reasoning = False
        self._space, self._drops_space, self._may_open = "", False, True
        is_closed = not form.closers
        while True:
            space = yield from scan.take_space()
            if not (yield from scan.take(*form.closers)):
                if (yield from scan.ends_within(*form.marks)):
                    return
                self._write(space)
                break
            is_closed = True
        if not is_closed:
            self._dropped = (*self._dropped, *form.closers)

    def _write(self, text: str) -> None:
        if self._drops_space:
            text = text.lstrip(_SPACE)
        body = text.rstrip(_SPACE)
        if body:
            self._put(self._space + body)
            self._space, self._drops_space, self._may_open = "", False, False
        self._space += text[len(body) :]

    def _put(self, text: str) -> None:
        self._parts.append(ReasoningPart(text) if self._is_reasoning else TextPart(text))
