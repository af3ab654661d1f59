"""Phi 4 mini: <|tool_call|>[{"name": ..., "arguments": ...}]<|/tool_call|>, or functools[{...}]."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.text.forms.calls import Calls, json_calls
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.hermes import json_call_rule
from fastserve.text.forms.scanner import Steps
from fastserve.text.grammar import literal


class Phi4(Form):
    name = "phi4"
    found_by = (("<|/tool_call|>",), ("<|tool_call|>", "<|/tool|>"), ("functools[",), ("<|tool|>", "<|/tool|>"))
    openers = ("<|tool_call|>", "functools")
    closers = ("<|/tool_call|>",)

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        yield from json_calls(calls, self.closers)

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [json_call_rule(function, value) for function in functions],
            begin=f'{mark("<|tool_call|>")} "["',
            between=literal(", "),
            end=f'"]" {mark("<|/tool_call|>")}',
        )
