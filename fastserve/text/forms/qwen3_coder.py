"""Qwen 3 Coder, Qwen 3.5, Nemotron 3, Step 3.5: <tool_call><function=f><parameter=a>value</parameter></function>."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastserve.text.forms.calls import ArgumentWriter, Calls
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.scanner import NotACallError, Steps

_NAME = re.compile(r"[^>\r\n<]*")
_MAX_NAME_CHARS = 256
_ENDS = ("\n</parameter>", "</parameter>", "\n</function>", "</function>", "\n<parameter=", "\n</tool_call>")
"""Any of them ends a value: models leave closing tags out."""


class Qwen3Coder(Form):
    name = "qwen3_coder"
    found_by = (("<function=", "<parameter="),)
    openers = ("<tool_call>", "<function=")
    closers = ("</tool_call>",)
    inner_marks = ("<parameter=", "</parameter>", "</function>")

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        scan = calls.scan
        if opener == "<tool_call>":
            yield from scan.take_space()
            yield from scan.need("<function=")
        while True:
            yield from self._call(calls)
            yield from scan.take_space()
            if not (yield from scan.take("<function=")):
                return

    def _call(self, calls: Calls) -> Steps[None]:
        scan = calls.scan
        name = (yield from scan.take_run(_NAME, _MAX_NAME_CHARS)).strip()
        yield from scan.need(">")
        if not calls.has(name):
            raise NotACallError
        calls.begin(name)
        writer = ArgumentWriter(calls, name)
        while True:
            yield from scan.take_space()
            if not (yield from scan.take("<parameter=")):
                break
            argument = yield from scan.take_run(_NAME, _MAX_NAME_CHARS)
            if not (yield from scan.peek()):
                break
            types = writer.name(argument.strip())
            yield from scan.take(">")
            yield from scan.take("\n")
            end = yield from writer.text(_ENDS, types)
            if not end:
                return
            yield from scan.take("\n</parameter>", "</parameter>")
        if not (yield from scan.peek()):
            calls.closing = writer.closing
            return
        yield from scan.take("</function>")
        writer.end()

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return None  # values are bare text, which no JSON schema describes
