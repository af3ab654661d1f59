"""Mistral: [TOOL_CALLS] [{"name": ..., "arguments": ...}], or [TOOL_CALLS]f[CALL_ID]id[ARGS]{...} from v11 on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from fastserve.text.forms.calls import Calls, json_arguments, json_calls, next_is
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.hermes import json_call_rule
from fastserve.text.forms.scanner import NotACallError, Steps
from fastserve.text.grammar import literal

_NAME = re.compile(r"[A-Za-z0-9_.:-]*")
_ID = re.compile(r"[A-Za-z0-9]*")
_MAX_NAME_CHARS = 256
_ID_CHARS = 9


class Mistral(Form):
    """The form of v3 and v7."""

    name = "mistral"
    found_by: ClassVar[Sequence[Sequence[str]]] = (("[TOOL_CALLS]",),)
    openers = ("[TOOL_CALLS]",)
    inner_marks = ("[CALL_ID]", "[ARGS]")
    id_length = _ID_CHARS

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        scan = calls.scan
        yield from scan.take_space()
        if (yield from next_is(scan, "[{", "[", "{")):
            yield from json_calls(calls, self.openers)
            return
        name = yield from scan.take_run(_NAME, _MAX_NAME_CHARS)
        if not calls.has(name):
            raise NotACallError
        call_id = None
        if (yield from scan.take("[CALL_ID]")):
            call_id = yield from scan.take_run(_ID, _MAX_NAME_CHARS)
        yield from scan.take("[ARGS]")
        yield from scan.take_space()
        if (yield from scan.peek()) != "{":
            raise NotACallError
        calls.begin(name, call_id if call_id is not None and len(call_id) == _ID_CHARS else None)
        yield from json_arguments(calls, self.openers)

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [json_call_rule(function, value) for function in functions],
            begin=mark("[TOOL_CALLS]") + r" / ?\[/",
            between=literal(", "),
            end=literal("]"),
        )


class MistralV11(Mistral):
    name = "mistral_v11"
    found_by: ClassVar[Sequence[Sequence[str]]] = (("[TOOL_CALLS]", "[ARGS]"),)

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [
                f"{mark('[TOOL_CALLS]')} {literal(function.name)} {mark('[ARGS]')} {value(function.parameters)}"
                for function in functions
            ]
        )
