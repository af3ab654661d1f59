"""Llama 3: {"name": ..., "parameters": ...} as the whole answer, or after <|python_tag|>."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.text.forms.calls import Calls, json_calls
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.hermes import json_call_rule
from fastserve.text.forms.scanner import Steps
from fastserve.text.grammar import literal


class Llama3Json(Form):
    name = "llama3_json"
    found_by = (("<|python_tag|>",), ("Environment: ipython",), ('"parameters": dictionary of argument name',))
    openers = ("<|python_tag|>",)
    start_openers = ("{",)
    ends_reasoning = False

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        if opener == "{":
            calls.scan.at -= 1
        yield from json_calls(calls)

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [json_call_rule(function, value, "parameters") for function in functions], between=literal("; ")
        )
