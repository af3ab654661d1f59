"""Granite 3: <|tool_call|>[{"name": ..., "arguments": ...}] or <tool_call>[...], which nothing closes; and
<function_call> {...} of 20b-functioncalling.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.text.forms.calls import Calls, json_calls
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.hermes import json_call_rule
from fastserve.text.forms.scanner import Steps
from fastserve.text.grammar import literal


class Granite(Form):
    name = "granite"
    found_by = (("<|tool_call|>",), ("<function_call>",), ("available_tools", "tool_response"))
    openers = ("<|tool_call|>", "<tool_call>", "<function_call>")

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        yield from json_calls(calls, self.openers)

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [json_call_rule(function, value) for function in functions],
            begin=f'{mark("<|tool_call|>")} "["',
            between=literal(", "),
            end=literal("]"),
        )
