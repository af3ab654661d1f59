"""Llama 4, LFM2 and others: [f(a=1, b="x"), g()], with literals of Python."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from typing import ClassVar

from fastserve.text.forms.calls import Calls
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.json_text import string_piece
from fastserve.text.forms.scanner import NotACallError, Scanner, Steps
from fastserve.text.forms.values import python_to_json

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_MAX_NAME_CHARS = 256
_OUTSIDE = re.compile(r"[^\"'()\[\]{}]*")
_INSIDE = re.compile(r"[^\"'\\]*")
_QUOTES = ('"""', "'''", '"', "'")


class Pythonic(Form):
    name = "pythonic"
    found_by: ClassVar[Sequence[Sequence[str]]] = (
        ("<|python_start|>",),
        ("<|tool_call_start|>",),
        ("[func_name1(params_name1=params_value1",),
    )
    openers = ("<|python_start|>", "<|tool_call_start|>", "[")
    closers = ("<|python_end|>", "<|tool_call_end|>")
    ends_reasoning = False

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        scan = calls.scan
        if opener != "[":
            yield from scan.take_space()
            yield from scan.take("[")
        while True:
            yield from scan.take_space()
            name = yield from scan.take_run(_NAME, _MAX_NAME_CHARS)
            yield from scan.need("(")
            if not calls.has(name):
                raise NotACallError
            arguments = _to_json((yield from _inside_brackets(scan)))
            calls.begin(name)
            calls.add(arguments)
            calls.end()
            yield from scan.take_space()
            if not (yield from scan.take(",", ";")):
                yield from scan.take("]")
                scan.hold()
                return

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return None  # literals of Python are no JSON


class Llama4Pythonic(Pythonic):
    name = "llama4_pythonic"
    found_by: ClassVar[Sequence[Sequence[str]]] = ()


def _inside_brackets(scan: Scanner) -> Steps[str]:
    """The text up to the bracket that closes the one before it, without that bracket."""
    pieces, depth = [], 1
    while True:
        pieces.append((yield from scan.take_run(_OUTSIDE)))
        char = yield from scan.peek()
        if not char:
            raise NotACallError
        if char in "\"'":
            pieces.append((yield from _quoted(scan)))
            continue
        scan.at += 1
        depth += 1 if char in "([{" else -1
        if not depth:
            return "".join(pieces)
        pieces.append(char)


def _quoted(scan: Scanner) -> Steps[str]:
    """A string literal with its quotes."""
    quote = yield from scan.take(*_QUOTES)
    pieces = [quote]
    while True:
        pieces.append((yield from scan.take_run(_INSIDE)))
        if (yield from scan.take(quote)):
            return "".join([*pieces, quote])
        for _ in range(2):
            char = yield from scan.peek()
            if not char:
                raise NotACallError
            scan.at += 1
            pieces.append(char)
            if char != "\\":
                break


def _to_json(text: str) -> str:
    """The arguments of a call of Python as a JSON object. Raises NotACallError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
            call = ast.parse(f"f({text})", mode="eval").body
        values = [(one.arg, ast.get_source_segment(f"f({text})", one.value)) for one in call.keywords]  # type: ignore[attr-defined]
    # What a model wrote may be anything, also too deep for the parser.
    except (ValueError, SyntaxError, MemoryError, RecursionError, AttributeError):
        raise NotACallError from None
    if call.args:  # type: ignore[attr-defined]
        raise NotACallError
    members = []
    for name, source in values:
        value = None if source is None else python_to_json(_as_python(source))
        if name is None or value is None:
            raise NotACallError
        members.append(f'"{string_piece(name)}": {value}')
    return "{" + ", ".join(members) + "}"


def _as_python(source: str) -> str:
    """A literal of Python or JSON as one of Python."""
    return {"true": "True", "false": "False", "null": "None"}.get(source, source)
