"""DeepSeek: V3 and R1 (fenced JSON), V3.1 (bare JSON), and V3.2 and V4 (tags, DSML)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from fastserve.text.forms.calls import ArgumentWriter, Calls, json_arguments
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.scanner import NotACallError, Steps
from fastserve.text.forms.values import is_text_only
from fastserve.text.grammar import literal

# U+FF5C and U+2581 stand for the vertical bar and the space.
_CALLS_BEGIN, _CALLS_END = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
_BEGIN, _SEPARATOR, _END = (f"<\uff5ctool\u2581{name}\uff5c>" for name in ("call\u2581begin", "sep", "call\u2581end"))
_NAME = re.compile(r"[A-Za-z0-9_.:-]*")
_MAX_NAME_CHARS = 256
_FENCE, _FENCE_END = literal("\n```json\n"), literal("\n```")
_DSML = "\uff5cDSML\uff5c"
_ATTRIBUTES = re.compile(r"[^<>]*")
_STRING = frozenset({"string"})
_TEXT = 'string="true"'


class DeepseekV3(Form):
    name = "deepseek_v3"
    found_by: ClassVar[Sequence[Sequence[str]]] = ((_CALLS_BEGIN, "```json"), (_CALLS_BEGIN, "function" + _SEPARATOR))
    openers = (_CALLS_BEGIN, _BEGIN)
    closers = (_END, _CALLS_END)
    inner_marks = (_SEPARATOR, "\n```")

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        scan = calls.scan
        if opener == _CALLS_BEGIN:
            yield from scan.take_space()
            yield from scan.need(_BEGIN)
        while True:
            yield from self._call(calls)
            yield from scan.take_space()
            yield from scan.take(_END)
            scan.hold()
            yield from scan.take_space()
            if not (yield from scan.take(_BEGIN)):
                return

    def _call(self, calls: Calls) -> Steps[None]:
        """A call in either form: `function` before the separator, or the function's name."""
        scan = calls.scan
        name = yield from scan.take_run(_NAME, _MAX_NAME_CHARS)
        yield from scan.need(_SEPARATOR)
        fence = ""
        if name == "function" and not calls.has(name):
            name = yield from scan.take_run(_NAME, _MAX_NAME_CHARS)
        yield from scan.take_space()
        if (yield from scan.take("```json")):
            fence = "```"
            yield from scan.take_space()
        if not calls.has(name) or (yield from scan.peek()) != "{":
            raise NotACallError
        calls.begin(name)
        yield from json_arguments(calls, ("\n```", "```", _END) if fence else (_END,))
        if fence:
            yield from scan.take_space()
            if not (yield from scan.take(fence)):
                yield from scan.ends_within(fence)
            scan.hold()

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [
                f"{mark(_BEGIN)} {literal('function')} {mark(_SEPARATOR)} {literal(one.name)} {_FENCE} "
                f"{value(one.parameters)} {_FENCE_END} {mark(_END)}"
                for one in functions
            ],
            begin=mark(_CALLS_BEGIN),
            between=literal("\n"),
            end=mark(_CALLS_END),
        )


class DeepseekV31(DeepseekV3):
    name = "deepseek_v31"
    found_by: ClassVar[Sequence[Sequence[str]]] = ((_CALLS_BEGIN,),)

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [
                f"{mark(_BEGIN)} {literal(one.name)} {mark(_SEPARATOR)} {value(one.parameters)} {mark(_END)}"
                for one in functions
            ],
            begin=mark(_CALLS_BEGIN),
            end=mark(_CALLS_END),
        )


class DeepseekV32(Form):
    """Tags whose attribute `string` says whether a value is text or JSON."""

    name = "deepseek_v32"
    found_by: ClassVar[Sequence[Sequence[str]]] = ((_DSML,),)
    openers = (f"<{_DSML}function_calls>", f"<{_DSML}tool_calls>", f"<{_DSML}invoke ")
    closers = (f"</{_DSML}function_calls>", f"</{_DSML}tool_calls>")
    inner_marks = (f"<{_DSML}parameter ", f"</{_DSML}parameter>", f"</{_DSML}invoke>")
    _ends = (f"</{_DSML}parameter>", f"</{_DSML}invoke>", f"<{_DSML}parameter ")

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        scan = calls.scan
        invoke, close = f"<{_DSML}invoke ", f"</{_DSML}invoke>"
        if opener != invoke:
            yield from scan.take_space()
            yield from scan.need(invoke)
        while True:
            name = _attribute((yield from scan.take_run(_ATTRIBUTES, _MAX_NAME_CHARS)), "name")
            yield from scan.need(">")
            if name is None or not calls.has(name):
                raise NotACallError
            calls.begin(name)
            if not (yield from self._arguments(calls, name, close)):
                return
            yield from scan.take_space()
            if not (yield from scan.take(invoke)):
                return

    def _arguments(self, calls: Calls, name: str, close: str) -> Steps[bool]:
        """Read the arguments up to the end of the call; return whether it is there."""
        scan, writer = calls.scan, ArgumentWriter(calls, name)
        yield from scan.take_space()
        if (yield from scan.peek()) == "{":  # JSON in place of tags
            yield from json_arguments(calls, (close,))
            yield from scan.take_space()
            yield from scan.take(close)
            scan.hold()
            return True
        while (yield from scan.take(f"<{_DSML}parameter ")):
            attributes = yield from scan.take_run(_ATTRIBUTES, _MAX_NAME_CHARS)
            if not (yield from scan.take(">")) and not (yield from scan.peek()):
                break
            types = writer.name(_attribute(attributes, "name") or "")
            is_text = _TEXT in attributes
            if not (yield from writer.text(self._ends, _STRING if is_text or is_text_only(types) else types)):
                return False
            yield from scan.take(self._ends[0])
            yield from scan.take_space()
        if not (yield from scan.peek()):
            calls.closing = writer.closing
            return False
        yield from scan.take(close)
        writer.end()
        return True

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [
                f"{literal(f'<{_DSML}invoke name=' + chr(34) + one.name + chr(34) + '>')} {value(one.parameters)} "
                f"{literal(f'</{_DSML}invoke>' + chr(10))}"
                for one in functions
            ],
            begin=literal(f"<{_DSML}function_calls>\n"),
            end=literal(f"</{_DSML}function_calls>"),
        )


def _attribute(tag: str, name: str) -> str | None:
    found = re.search(rf'{name}="([^"]*)"', tag)
    return None if found is None else found[1]
