"""GLM 4.5 and later: <tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value></tool_call>."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastserve.text.forms.calls import ArgumentWriter, Calls, next_is
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.scanner import NotACallError, Steps

_NAME = re.compile(r"[A-Za-z0-9_.:-]*")
_KEY = re.compile(r"[^<\r\n]*")
_MAX_NAME_CHARS = 256
_ENDS = ("</arg_value>", "</tool_call>", "<arg_key>")


class Glm4(Form):
    name = "glm4"
    found_by = (("<arg_key>", "<arg_value>"),)
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)
    inner_marks = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        scan = calls.scan
        yield from scan.take_space()
        name = yield from scan.take_run(_NAME, _MAX_NAME_CHARS)
        if not calls.has(name):
            raise NotACallError
        yield from scan.take_space()
        # The name is not complete before one of these.
        if not (yield from next_is(scan, "<arg_key>", "</tool_call>")):
            raise NotACallError
        calls.begin(name)
        writer = ArgumentWriter(calls, name)
        while True:
            yield from scan.take_space()
            if not (yield from scan.take("<arg_key>")):
                break
            argument = yield from scan.take_run(_KEY, _MAX_NAME_CHARS)
            if not (yield from scan.peek()):
                break
            types = writer.name(argument.strip())
            yield from scan.take("</arg_key>")
            yield from scan.take_space()
            yield from scan.take("<arg_value>")
            end = yield from writer.text(_ENDS, types)
            if not end:
                return
            yield from scan.take("</arg_value>")
        if not (yield from scan.peek()):
            calls.closing = writer.closing
            return
        writer.end()

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return None  # values are bare text, which no JSON schema describes
