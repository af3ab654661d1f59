"""Code shared by the forms of tool calls: the calls of an answer, and readers of calls that are written as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastserve.text.forms.json_text import JsonText, is_json, string_piece
from fastserve.text.forms.scanner import NotACallError, Scanner, Steps
from fastserve.text.forms.values import is_text_only, to_json, types_of
from fastserve.text.parts import Part, ToolCallPart


class AnswerEndError(Exception):
    """The answer has as many calls as it may have."""


class Calls:
    """The calls of one answer. Text is held back until a call begins, and from one call to the next."""

    def __init__(
        self,
        scan: Scanner,
        parts: list[Part],
        parameters: Mapping[str, Mapping[str, Any]],
        make_id: Callable[[int], str],
        max_calls: int | None,
    ) -> None:
        """`parameters`: by the names of the functions that may be called."""
        self.scan = scan
        self.num_begun = 0
        self.closing: str | None = None
        """Text that completes the arguments of a call that the end of the answer cut off."""
        self._parts = parts
        self._parameters = parameters
        self._make_id = make_id
        self._max_calls = max_calls
        self.is_open = False
        """Whether a call has begun and not ended."""
        self._has_arguments = False

    def has(self, name: str) -> bool:
        return name in self._parameters

    def types(self, function: str, argument: str) -> frozenset[str]:
        """JSON types that an argument may have."""
        return types_of(self._parameters[function], argument)

    def begin(self, name: str, call_id: str | None = None) -> None:
        """Begin a call of a known function: from here on it cannot be text any more."""
        self.scan.release()
        call_id = self._make_id(self.num_begun) if call_id is None else call_id
        self._parts.append(ToolCallPart(self.num_begun, call_id, name))
        self.num_begun += 1
        self.is_open, self._has_arguments = True, False

    def add(self, arguments: str) -> None:
        if arguments:
            self._has_arguments = True
            self._parts.append(ToolCallPart(self.num_begun - 1, arguments=arguments))

    def end(self) -> None:
        if not self._has_arguments:
            self.add("{}")
        self.is_open = False
        self.scan.hold()
        if self.num_begun == self._max_calls:
            raise AnswerEndError

    def give_up(self) -> None:
        """End a call that is open."""
        if self.is_open:
            self.end()


def json_calls(calls: Calls, ends: tuple[str, ...] = (), *, separators: tuple[str, ...] = (",", ";")) -> Steps[None]:
    """One call {"name": ..., "arguments": ...}, several, or an array of them. `ends`: marks that end broken ones."""
    scan = calls.scan
    yield from scan.take_space()
    is_array = bool((yield from scan.take("[")))
    yield from json_call(calls, ends)
    while True:
        yield from scan.take_space()
        if is_array and (yield from scan.take("]")):
            calls.scan.hold()
            return
        separator = yield from scan.take(*separators)
        if separator:
            yield from scan.take_space()
        elif is_array:
            return
        if not (yield from next_is(scan, "{")):
            if separator:
                raise NotACallError
            return
        yield from json_call(calls, ends)


def json_call(calls: Calls, ends: tuple[str, ...]) -> Steps[None]:
    """A call as a JSON object, whose members come in any order."""
    scan = calls.scan
    yield from scan.need("{")
    name, early = None, None
    is_first = True
    while True:
        yield from scan.take_space()
        if (yield from scan.take("}")):
            break
        if not is_first:
            yield from scan.need(",")
            yield from scan.take_space()
        is_first = False
        key = yield from _string(scan)
        yield from scan.take_space()
        yield from scan.need(":")
        yield from scan.take_space()
        if key in ("name", "function") and name is None:
            name = yield from _string(scan)
            if not calls.has(name):
                raise NotACallError
            if early is not None:
                break
        elif key in ("arguments", "parameters", "args") and early is None:
            if name is not None and (yield from scan.peek()) == "{":
                calls.begin(name)
                yield from json_arguments(calls, ends)
                yield from _rest(scan)
                calls.scan.hold()
                return
            early = _as_object((yield from _value(scan)))
            if name is not None:
                break
        else:
            yield from _value(scan)
    if name is None:
        raise NotACallError
    at_end = early is None  # the object is closed
    calls.begin(name)
    calls.add(early or "{}")
    calls.end()
    if not at_end:
        yield from _rest(scan)
        calls.scan.hold()


def json_arguments(calls: Calls, ends: tuple[str, ...]) -> Steps[None]:
    """The arguments of a call that has begun: a JSON object, sent as it comes. A broken one is sent up to one of
    `ends`, or completed if only ends of brackets are missing there.
    """
    scan, value = calls.scan, JsonText()
    if not (yield from scan.peek()):
        calls.closing = "{}"
        return
    while value.state == "open":
        text, scan.at = value.feed(scan.text, scan.at, scan.limit)
        calls.add(text)
        if value.state == "open" and not (yield from scan.more()):
            calls.closing = value.closing()
            return
    if value.state == "bad":
        space = yield from scan.take_space()
        closing = value.closing()
        if closing is not None and (yield from next_is(scan, *ends)):
            calls.add(closing)
        else:
            calls.add(space)
            yield from scan.take_until(ends, calls.add)
    calls.end()


def next_is(scan: Scanner, *marks: str) -> Steps[bool]:
    """Whether one of `marks` is next, without taking it."""
    found = yield from scan.take(*marks)
    scan.at -= len(found)
    return bool(found)


def _rest(scan: Scanner) -> Steps[None]:
    """The end of a call's object after its arguments. Its bracket may be missing; other members have no meaning."""
    while True:
        yield from scan.take_space()
        if not (yield from scan.take(",")):
            yield from scan.take("}")
            return
        yield from scan.take_space()
        yield from _string(scan)
        yield from scan.take_space()
        yield from scan.need(":")
        yield from scan.take_space()
        yield from _value(scan)


def _value(scan: Scanner) -> Steps[str]:
    """The text of any JSON value. Raises NotACallError."""
    value, pieces = JsonText(), []
    while value.state == "open":
        text, scan.at = value.feed(scan.text, scan.at, scan.limit)
        pieces.append(text)
        if value.state == "open" and not (yield from scan.more()):
            value.finish()
            break
    if value.state != "done":
        raise NotACallError
    return "".join(pieces)


def _string(scan: Scanner) -> Steps[str]:
    if (yield from scan.peek()) != '"':
        raise NotACallError
    return str(json.loads((yield from _value(scan))))


def _as_object(text: str) -> str:
    """Arguments that are no object: null, or an object that is written as a string."""
    if text[0] == "{":
        return text
    inner = json.loads(text) if text[0] == '"' else "" if text == "null" else text
    if not inner.strip():
        return "{}"
    if inner.lstrip()[0] != "{" or not is_json(inner):
        raise NotACallError
    return str(inner)


class ArgumentWriter:
    """Writes the arguments of a call that has begun as a JSON object, one by one."""

    def __init__(self, calls: Calls, function: str) -> None:
        self._calls = calls
        self._function = function
        self._is_first = True

    def name(self, name: str) -> frozenset[str]:
        """Begin an argument; return the types that it may have."""
        self._calls.add(("{" if self._is_first else ", ") + f'"{string_piece(name)}": ')
        self._is_first = False
        return self._calls.types(self._function, name)

    def text(self, ends: tuple[str, ...], types: frozenset[str]) -> Steps[str]:
        """A value that is bare text up to one of `ends`, which is returned and not taken. Strings are sent as they
        come.
        """
        scan = self._calls.scan
        if is_text_only(types):
            self._calls.add('"')
            found = yield from scan.take_until(ends, lambda piece: self._calls.add(string_piece(piece)))
            if not found:
                self._calls.closing = '"}'
                return ""
            self._calls.add('"')
            return found
        pieces: list[str] = []
        found = yield from scan.take_until(ends, pieces.append)
        value = to_json("".join(pieces), types)
        if found:
            self._calls.add(value)
        else:
            self._calls.closing = value + "}"
        return found

    @property
    def closing(self) -> str:
        """Completes the arguments."""
        return "{}" if self._is_first else "}"

    def end(self) -> None:
        self._calls.add(self.closing)
        self._calls.end()
