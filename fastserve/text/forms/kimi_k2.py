"""Kimi K2: <|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|> in a section.

The header is the id of the call, which the model needs to see unchanged in the next turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastserve.text.forms.calls import Calls, json_arguments
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.scanner import NotACallError, Steps

_HEADER = re.compile(r"[A-Za-z0-9_.:-]*")
_MAX_HEADER_CHARS = 256
_BEGIN, _ARGUMENT, _END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


class KimiK2(Form):
    name = "kimi_k2"
    found_by = (("<|tool_calls_section_begin|>",), (_BEGIN, _ARGUMENT))
    openers = ("<|tool_calls_section_begin|>", _BEGIN)
    closers = (_END, "<|tool_calls_section_end|>")
    inner_marks = (_ARGUMENT,)

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        scan = calls.scan
        if opener != _BEGIN:
            yield from scan.take_space()
            yield from scan.need(_BEGIN)
        while True:
            yield from scan.take_space()
            header = yield from scan.take_run(_HEADER, _MAX_HEADER_CHARS)
            yield from scan.take_space()
            yield from scan.need(_ARGUMENT)
            yield from scan.take_space()
            if (yield from scan.peek()) != "{":
                raise NotACallError
            name = _name(header, calls)
            is_id = header.startswith("functions.") and header.rpartition(":")[2].isdecimal()
            calls.begin(name, header if is_id else f"functions.{name}:{calls.num_begun}")
            yield from json_arguments(calls, (_END,))
            yield from scan.take_space()
            yield from scan.take(_END)
            scan.hold()
            yield from scan.take_space()
            if not (yield from scan.take(_BEGIN)):
                return

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [
                f'{mark(_BEGIN)} "functions.{function.name}:" /[0-9]/ {mark(_ARGUMENT)} '
                f"{value(function.parameters)} {mark(_END)}"
                for function in functions
            ],
            begin=mark("<|tool_calls_section_begin|>"),
            end=mark("<|tool_calls_section_end|>"),
        )


def _name(header: str, calls: Calls) -> str:
    """The name in a header, also in malformed ones such as `functionsexec5`. Names may have dots and digits."""
    for candidate in (header, header.removeprefix("functions.")):
        for name in (candidate, candidate.rpartition(":")[0], candidate.rstrip("0123456789").rstrip(":")):
            if name and calls.has(name):
                return name
    raise NotACallError
