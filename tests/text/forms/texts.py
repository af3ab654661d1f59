"""Answers in every form of calls: shared ones, rendered by each form, and special ones of some."""

# ruff: noqa: RUF001  marks have characters that look like others
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Call = tuple[str, dict[str, Any]]

FUNCTIONS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "near": {"type": "array", "items": {"type": "string"}},
            "place": {"type": "object"},
        },
    },
    "calc": {"type": "object", "properties": {"expression": {"type": "string"}}},
    "now": {"type": "object", "properties": {}},
}

WEATHER: Call = ("get_weather", {"city": "Oslo"})
CALLS: dict[str, tuple[str, list[Call], str]] = {
    # text before, calls, text after
    "one": ("", [WEATHER], ""),
    "in prose": ("Let me look: ", [WEATHER], ""),
    "text after": ("", [WEATHER], "\nDone, as asked."),
    "no arguments": ("", [("now", {})], ""),
    "two": ("", [WEATHER, ("calc", {"expression": "1+2"})], ""),
    "three with none": ("So:\n", [("now", {}), WEATHER, ("now", {})], ""),
    "unicode": ("世界 😀 ", [("get_weather", {"city": "Zürich 🌦 東京"})], ""),
    "quotes": ("", [("get_weather", {"city": 'say "hi" \\ back'})], ""),
    "lines": ("", [("calc", {"expression": "a\n  b\n\tc"})], ""),
    "digits stay text": ("", [("get_weather", {"city": "007"})], ""),
    "words stay text": ("", [("get_weather", {"city": "true"})], ""),
    "null text": ("", [("get_weather", {"city": "null"})], ""),
    "union with null": ("", [("get_weather", {"city": "x", "unit": None})], ""),
    "union with text": ("", [("get_weather", {"city": "x", "unit": "12"})], ""),
    "numbers": ("", [("get_weather", {"city": "x", "days": 3, "exact": True})], ""),
    "negative": ("", [("get_weather", {"days": -12, "exact": False})], ""),
    "list": ("", [("get_weather", {"near": ["a", "b, c", ""]})], ""),
    "nested": ("", [("get_weather", {"place": {"x": {"y": [1, {"z": None}]}, "t": "u"}})], ""),
    "empty ones": ("", [("get_weather", {"near": [], "place": {}})], ""),
    "brackets in text": ("", [("calc", {"expression": "f(a[0], {1: ')'}"})], ""),
    "long": ("", [("calc", {"expression": "x = 1 + 2;\n" * 60})], ""),
    "html stays": ("", [("calc", {"expression": "a &lt; b && c > d"})], ""),
}
"""Answers that every form can write."""

PROSE = {
    "plain": "It is 12.",
    "empty": "",
    "spaces": "  a \n\n b  ",
    "beginning of marks": "a < b, <t, <|, [, {, [T, functool",
    "code": 'if (a[0] < b) { return "x"; }',
    "json": '[1, {"a": "b"}, null]',
    "cut opener": "<tool_c",
    "other marks": "<b>bold</b> <|x|> [link](https://a.b)",
}
"""Texts without a call in any form."""


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _json_call(call: Call, arguments: str = "arguments") -> str:
    return f'{{"name": "{call[0]}", "{arguments}": {_dumped(call[1])}}}'


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else _dumped(value)


def _hermes(calls: list[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_json_call(call)}\n</tool_call>" for call in calls)


def _qwen3_coder(calls: list[Call]) -> str:
    def write(call: Call) -> str:
        values = "".join(f"<parameter={name}>\n{_bare(value)}\n</parameter>\n" for name, value in call[1].items())
        return f"<tool_call>\n<function={call[0]}>\n{values}</function>\n</tool_call>"

    return "\n".join(map(write, calls))


def _glm4(calls: list[Call]) -> str:
    def write(call: Call) -> str:
        values = "".join(
            f"\n<arg_key>{name}</arg_key>\n<arg_value>{_bare(value)}</arg_value>" for name, value in call[1].items()
        )
        return f"<tool_call>{call[0]}{values}\n</tool_call>"

    return "\n".join(map(write, calls))


def _pythonic(calls: list[Call]) -> str:
    def write(call: Call) -> str:
        return f"{call[0]}({', '.join(f'{name}={value!r}' for name, value in call[1].items())})"

    return f"[{', '.join(map(write, calls))}]"


def _gemma(quote: str, begin: str, end: str) -> Callable[[list[Call]], str]:
    def write(value: Any) -> str:
        match value:
            case str():
                return quote + value + quote
            case dict():
                return "{" + ",".join(f"{name}:{write(item)}" for name, item in value.items()) + "}"
            case list():
                return "[" + ",".join(map(write, value)) + "]"
        return _dumped(value)

    return lambda calls: "".join(f"{begin}call:{name}{write(arguments)}{end}" for name, arguments in calls)


def _deepseek(calls: list[Call], call_text: Callable[[Call], str]) -> str:
    inner = "\n".join(f"<｜tool▁call▁begin｜>{call_text(call)}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def _deepseek_v32(calls: list[Call]) -> str:
    def write(call: Call) -> str:
        values = "".join(
            f'<｜DSML｜parameter name="{name}" string="{str(isinstance(value, str)).lower()}">{_bare(value)}'
            "</｜DSML｜parameter>\n"
            for name, value in call[1].items()
        )
        return f'<｜DSML｜invoke name="{call[0]}">\n{values}</｜DSML｜invoke>\n'

    return f"<｜DSML｜function_calls>\n{''.join(map(write, calls))}</｜DSML｜function_calls>"


def _kimi(calls: list[Call]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>{_dumped(arguments)}<|tool_call_end|>"
        for at, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def _harmony(calls: list[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{_dumped(arguments)}<|call|>"
        for name, arguments in calls
    )


RENDER: dict[str, Callable[[list[Call]], str]] = {
    "hermes": _hermes,
    "qwen3_coder": _qwen3_coder,
    "glm4": _glm4,
    "llama3_json": lambda calls: "<|python_tag|>" + "; ".join(_json_call(call, "parameters") for call in calls),
    "pythonic": _pythonic,
    "llama4_pythonic": lambda calls: f"<|python_start|>{_pythonic(calls)}<|python_end|>",
    "mistral": lambda calls: f"[TOOL_CALLS] [{', '.join(map(_json_call, calls))}]",
    "mistral_v11": lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{_dumped(value)}" for name, value in calls),
    "functiongemma": _gemma("<escape>", "<start_function_call>", "<end_function_call>"),
    "gemma4": _gemma('<|"|>', "<|tool_call>", "<tool_call|>"),
    "deepseek_v3": lambda calls: _deepseek(
        calls, lambda call: f"function<｜tool▁sep｜>{call[0]}\n```json\n{_dumped(call[1])}\n```"
    ),
    "deepseek_v31": lambda calls: _deepseek(calls, lambda call: f"{call[0]}<｜tool▁sep｜>{_dumped(call[1])}"),
    "deepseek_v32": _deepseek_v32,
    "kimi_k2": _kimi,
    "phi4": lambda calls: f"<|tool_call|>[{', '.join(map(_json_call, calls))}]<|/tool_call|>",
    "granite": lambda calls: f"<|tool_call|>[{', '.join(map(_json_call, calls))}]",
    "harmony": _harmony,
}
