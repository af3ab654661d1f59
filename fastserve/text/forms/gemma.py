"""FunctionGemma and Gemma 4: call:f{a:<escape>x<escape>,n:3}. Names are bare, and strings stand between marks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from fastserve.text.forms.calls import Calls
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.json_text import string_piece
from fastserve.text.forms.scanner import NotACallError, Steps
from fastserve.text.forms.values import to_json, types_of

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_MAX_NAME_CHARS = 256
_KEY = re.compile(r"[^:{}\[\],<]*")
_BARE = re.compile(r"[^,\[\]{}<]*")
_TO_MARK = re.compile(r"[^<]*")
_MAX_DEPTH = 64


class FunctionGemma(Form):
    name = "functiongemma"
    found_by: ClassVar[Sequence[Sequence[str]]] = (("<start_function_call>",),)
    openers: ClassVar[tuple[str, ...]] = ("<start_function_call>",)
    closers: ClassVar[tuple[str, ...]] = ("<end_function_call>",)
    quote: ClassVar[str] = "<escape>"

    @property
    def marks(self) -> tuple[str, ...]:
        return (*super().marks, self.quote)

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        scan = calls.scan
        while True:
            yield from scan.take_space()
            yield from scan.need("call:")
            yield from scan.take_space()
            name = yield from scan.take_run(_NAME, _MAX_NAME_CHARS)
            yield from scan.need("{")
            if not calls.has(name):
                raise NotACallError
            calls.begin(name)
            reader = _Arguments(calls, name, self.quote, self.closers)
            try:
                yield from reader.members()
            except _EndOfTextError:
                calls.closing = reader.closing
                return
            calls.end()
            yield from scan.take_space()
            if not (yield from scan.take(",")):
                return

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return None  # names without quotes are no JSON


class Gemma4(FunctionGemma):
    name = "gemma4"
    found_by = (("<|tool_call>", "<tool_call|>"),)
    openers = ("<|tool_call>",)
    closers = ("<tool_call|>", "<|tool_response>")
    quote = '<|"|>'


class _EndOfTextError(Exception):
    """The answer ended inside the arguments."""


class _Arguments:
    """Writes the arguments as JSON while they come."""

    def __init__(self, calls: Calls, function: str, quote: str, ends: tuple[str, ...]) -> None:
        self._calls = calls
        self._scan = calls.scan
        self._function = function
        self._quote = quote
        self._ends = ends
        self._open: list[str] = []
        """Marks that close the open objects, arrays and strings, innermost last."""

    @property
    def closing(self) -> str:
        return "".join(reversed(self._open))

    def members(self) -> Steps[None]:
        """The members of an object whose bracket has been read."""
        yield from self._items("{", "}")

    def _items(self, begin: str, end: str) -> Steps[None]:
        scan, add = self._scan, self._calls.add
        add(begin)
        self._open.append(end)
        is_first = True
        while True:
            yield from scan.take_space()
            if not (yield from scan.peek()):
                raise _EndOfTextError
            if (yield from scan.take(end)) or not (is_first or (yield from scan.take(","))):
                break
            yield from scan.take_space()
            if not (yield from scan.peek()):
                raise _EndOfTextError
            if (yield from scan.take(end)):
                break
            separator = "" if is_first else ", "
            types = types_of({}, "")
            if end == "}":
                name = yield from self._name()
                if not (yield from scan.take(":")):
                    if not (yield from scan.peek()):
                        raise _EndOfTextError
                    break
                add(f'{separator}"{string_piece(name)}": ')
                if len(self._open) == 1:
                    types = self._calls.types(self._function, name)
            else:
                add(separator)
            is_first = False
            yield from self._value(types)
        add(self._open.pop())

    def _name(self) -> Steps[str]:
        if not (yield from self._scan.take(self._quote)):
            return (yield from self._scan.take_run(_KEY, _MAX_NAME_CHARS)).strip()
        pieces: list[str] = []
        yield from self._scan.take_until((self._quote, *self._ends), pieces.append)
        yield from self._scan.take(self._quote)
        return "".join(pieces)

    def _value(self, types: frozenset[str]) -> Steps[None]:
        scan, add = self._scan, self._calls.add
        yield from scan.take_space()
        if (yield from scan.take(self._quote)):
            add('"')
            self._open.append('"')
            if not (yield from scan.take_until((self._quote, *self._ends), lambda piece: add(string_piece(piece)))):
                raise _EndOfTextError
            yield from scan.take(self._quote)
            add(self._open.pop())
            return
        is_nested = (yield from scan.peek()) in ("{", "[") and len(self._open) < _MAX_DEPTH
        if is_nested:
            begin = yield from scan.take("{", "[")
            yield from self._items(begin, "}" if begin == "{" else "]")
            return
        bare = yield from scan.take_run(_BARE if len(self._open) < _MAX_DEPTH else _TO_MARK)
        while (yield from scan.peek()) == "<" and not (yield from self._at_end()):
            scan.at += 1
            bare += "<" + (yield from scan.take_run(_BARE))
        value = to_json(bare.strip(), types) if bare.strip() else "null"
        if not (yield from scan.peek()):
            self._open.append(value)
            raise _EndOfTextError
        add(value)

    def _at_end(self) -> Steps[bool]:
        found = yield from self._scan.take(*self._ends, self._quote)
        self._scan.at -= len(found)
        return bool(found)
