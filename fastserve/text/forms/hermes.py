"""Hermes, Qwen 2.5 and 3, SmolLM3, Granite 4: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.text.forms.calls import Calls, json_calls
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.scanner import Steps
from fastserve.text.grammar import literal


class Hermes(Form):
    name = "hermes"
    found_by = (("<tool_call>", '"name"'), ("<tool_call>", "'name'"), ("<tool_call>", "<tools>"))
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        yield from json_calls(calls, self.closers)

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [
                f'{mark("<tool_call>")} "\\n" {json_call_rule(function, value)} "\\n" {mark("</tool_call>")}'
                for function in functions
            ],
            between=literal("\n"),
        )


def json_call_rule(function: Function, value: Value, arguments: str = "arguments") -> str:
    """Lark expression for a call that is a JSON object."""
    head = literal(f'{{"name": "{function.name}", "{arguments}": ')
    return f"{head} {value(function.parameters)} {literal('}')}"
