# ruff: noqa: RUF001  marks have characters that look like others
"""Parts of answers in every form of calls are the same for every cut of the text."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence

import pytest

from fastserve.config import REASONING_PARSERS, TOOL_CALL_PARSERS
from fastserve.text.forms.find import FORMS, find_form, make_parser
from fastserve.text.forms.parser import ParserOptions
from fastserve.text.parts import Part, ReasoningPart, TextPart, ToolCallPart
from fastserve.text.reasoning import NO_REASONING, REASONING, ReasoningMarks
from tests.text.forms.texts import CALLS, FUNCTIONS, PROSE, RENDER

THINK = REASONING["qwen3"]
Answer = tuple[str, str, list[tuple[str, str, str]]]
"""Content, reasoning, and the calls: id, name, arguments."""


def options_of(form: str, reasoning: ReasoningMarks = NO_REASONING, *, is_open: bool = False) -> ParserOptions:
    return ParserOptions(FORMS[form], FUNCTIONS, reasoning, starts_in_reasoning=is_open)


def parse(options: ParserOptions, pieces: Sequence[str], *, cut_off: bool = False) -> Answer:
    parser = make_parser(options, "call_{}".format)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push(piece)
    return answer_of(parts + parser.finish(cut_off=cut_off))


def answer_of(parts: list[Part]) -> Answer:
    content, reasoning = "", ""
    calls: list[tuple[str, str, str]] = []
    for part in parts:
        match part:
            case TextPart(text):
                content += text
            case ReasoningPart(text):
                reasoning += text
            case ToolCallPart(index, call_id, name, arguments):
                if name:
                    assert index == len(calls)
                    calls.append((call_id, name, arguments))
                else:
                    assert index == len(calls) - 1, "calls never interleave"
                    calls[-1] = (*calls[-1][:2], calls[-1][2] + arguments)
    return content, reasoning, calls


def check_cuts(
    options: ParserOptions, text: str, num_random: int = 4, *, max_chars: int = 64, cut_off: bool = False
) -> Answer:
    """The answer, which must be the same for each cut into two, for single characters, and for random cuts."""
    expected = parse(options, [text], cut_off=cut_off)
    for at in range(1, len(text) if len(text) <= max_chars else 0):
        assert parse(options, [text[:at], text[at:]], cut_off=cut_off) == expected, (text[:at], text[at:])
    assert parse(options, list(text), cut_off=cut_off) == expected
    rng = random.Random(len(text))
    for _ in range(num_random):
        points = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(1, 20))))
        pieces = [text[begin:end] for begin, end in zip([0, *points], [*points, len(text)], strict=True)]
        assert parse(options, pieces, cut_off=cut_off) == expected, pieces
    return expected


def test_every_form_has_shared_texts() -> None:
    assert RENDER.keys() == FORMS.keys()


@pytest.mark.parametrize("form", RENDER)
def test_calls_are_found_in_every_cut(form: str) -> None:
    for name, (before, calls, after) in CALLS.items():
        text = before + RENDER[form](calls) + after
        if form == "harmony":
            text = f"<|channel|>commentary<|message|>{before}<|end|><|start|>assistant{text[len(before) :]}"
            text = text.removesuffix(after) + (f"<|start|>assistant<|channel|>final<|message|>{after}" if after else "")
        content, reasoning, found = check_cuts(options_of(form), text)
        assert reasoning == ""
        assert [(called, json.loads(arguments)) for _, called, arguments in found] == calls, name
        assert content.split() == (before + after).split(), name


@pytest.mark.slow
@pytest.mark.parametrize("form", RENDER)
def test_all_cuts_of_short_texts_and_many_of_long_ones(form: str) -> None:
    for before, calls, after in CALLS.values():
        text = before + RENDER[form](calls) + after
        check_cuts(options_of(form, THINK), text, 10_000 if len(text) > 300 else 100, max_chars=300)


@pytest.mark.parametrize("form", RENDER)
def test_calls_after_and_inside_of_reasoning(form: str) -> None:
    if form in ("harmony", "gemma4"):
        pytest.skip("has reasoning of its own")
    calls = RENDER[form]([("now", {}), ("get_weather", {"city": "Oslo"})])
    expected = [("now", {}), ("get_weather", {"city": "Oslo"})]
    for text, is_open in (
        (f"<think>\nwhy < 3\n</think>\n\n{calls}", False),
        (f"why < 3\n</think>\n\n{calls}", True),
        (f"why < 3\n{calls}\n</think>", True),
    ):
        if not FORMS[form].ends_reasoning and text.endswith("</think>"):
            continue
        content, reasoning, found = check_cuts(options_of(form, THINK, is_open=is_open), text)
        assert (content, reasoning) == ("", "why < 3"), text
        assert [(called, json.loads(arguments)) for _, called, arguments in found] == expected


@pytest.mark.parametrize("form", RENDER)
def test_prose_is_text(form: str) -> None:
    for text in PROSE.values():
        assert check_cuts(options_of(form), text) == (text, "", [])


@pytest.mark.parametrize("form", RENDER)
def test_a_call_that_is_cut_off_anywhere(form: str) -> None:
    """Nothing is lost or twice: what has been sent is the beginning of the call, or the text itself."""
    whole = RENDER[form]([("get_weather", {"city": "Oslo", "days": 2})])
    for size in range(1, len(whole)):
        text = whole[:size]
        cut_off = bool(size % 2)
        content, _, calls = check_cuts(options_of(form), text, 2, cut_off=cut_off)
        assert content == ("" if calls else text), "either text or a call"
        for _, name, arguments in calls:
            assert name == "get_weather"
            expected = json.dumps({"city": "Oslo", "days": 2})
            assert arguments == "{}" or expected.startswith(arguments[:5])


@pytest.mark.parametrize("form", RENDER)
def test_unknown_names_stay_text(form: str) -> None:
    text = RENDER[form]([("launch", {"city": "Oslo"})])
    content, _, calls = check_cuts(options_of(form), "a " + text + " b")
    assert calls == []
    assert content == "a " + text + " b"


@pytest.mark.parametrize("form", RENDER)
def test_noise_never_raises_and_is_the_same_for_every_cut(form: str) -> None:
    one = RENDER[form]([("get_weather", {"city": "Oslo", "days": 2}), ("now", {})])
    marks = [*FORMS[form].marks, "<think>", "</think>"]
    rng = random.Random(form)
    for _ in range(40):
        at, size = rng.randrange(len(one)), rng.randrange(1, 12)
        noisy = one[:at] + rng.choice([*marks, '"', "{", "}", "]", "x", " ", "\n", "\\", ""]) + one[at + size :]
        check_cuts(options_of(form, THINK, is_open=rng.random() < 0.3), noisy, 3, cut_off=rng.random() < 0.5)


def test_names_of_options_are_those_of_forms() -> None:
    assert set(TOOL_CALL_PARSERS) == FORMS.keys()
    assert set(REASONING_PARSERS) == REASONING.keys()


@pytest.mark.parametrize("form", [name for name in RENDER if name != "llama4_pythonic"])
def test_forms_are_found_in_chat_templates(form: str) -> None:
    """A template that writes calls has the marks of its form."""
    template = {
        "deepseek_v31": "<｜tool▁calls▁begin｜>",
        "llama3_json": 'Environment: ipython {"name": ',
        "mistral": "[TOOL_CALLS] [",
        "pythonic": "<|python_start|>",
    }.get(form, RENDER[form]([("get_weather", {"city": "Oslo"})]))
    found = find_form("{{ messages }} " + template)
    assert found is not None
    assert found.name == form


def test_reasoning_opened_by_the_prompt() -> None:
    assert THINK.is_open_after("<|im_start|>assistant\n<think>\n", "")
    assert not THINK.is_open_after("<|im_start|>assistant\n<think>\n\n</think>\n\n", "")
    assert not THINK.is_open_after("<|im_start|>user\nsay <think><|im_end|>\n<|im_start|>assistant\n", "")
    assert THINK.is_open_after("...<think>so far", "<think>so far")
    assert not THINK.is_open_after("...<think>a</think>b", "<think>a</think>b")


@pytest.mark.parametrize(
    ("form", "text", "content", "arguments"),
    [
        ("hermes", '<tool_call>{"arguments": {"days": 1}, "name": "get_weather"}</tool_call>', "", ['{"days": 1}']),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", ["{}"]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", ["{}"]),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", ['{"a": 1}']),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": [1}}</tool_call>', "", ['{"a": [1}}']),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": {"b": 2</tool_call>', "", ['{"a": {"b": 2}}']),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}</tool_call>', "", ['{"a": 1}']),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}}', "", ['{"a": 1}']),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>"}}</tool_call>',
            "",
            ['{"a": "</tool_call>"}'],
        ),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "x\ny"}}</tool_call>', "", ['{"a": "x\\ny"}']),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', None, []),
        ("hermes", "<tool_call>now()</tool_call>", None, []),
        ("hermes", "<tool_call>", None, []),
        ("hermes", '<tool_call><tool_call>{"name": "now"}</tool_call>', "<tool_call>", ["{}"]),
        ("hermes", '<tool_call>[{"name": "now"}, {"name": "now"}]</tool_call>', "", ["{}", "{}"]),
        ("llama3_json", '{"name": "now", "parameters": {"a": 1}}', "", ['{"a": 1}']),
        ("llama3_json", 'So: {"name": "now", "parameters": {}}', None, []),
        ("llama3_json", '{"name": "Ann", "age": 3}', None, []),
        ("qwen3_coder", "<function=now>\n</function>\n</tool_call>", "", ["{}"]),
        (
            "qwen3_coder",
            "<tool_call><function=get_weather><parameter=city>\nOslo\n<parameter=days>\n2\n</function></tool_call>",
            "",
            ['{"city": "Oslo", "days": 2}'],
        ),
        ("qwen3_coder", "<function=get_weather><parameter=unit>None</parameter></function>", "", ['{"unit": "None"}']),
        ("qwen3_coder", "<function=get_weather><parameter=days>soon</parameter></function>", "", ['{"days": "soon"}']),
        (
            "qwen3_coder",
            "<function=get_weather><parameter=place>{'a': True}</parameter></function>",
            "",
            ['{"place": {"a": true}}'],
        ),
        ("pythonic", "See [now()] or [f(1)].", "See or [f(1)].", ["{}"]),
        ("pythonic", "[now(1)]", None, []),
        ("pythonic", "[get_weather(city=open('x'))]", None, []),
        (
            "pythonic",
            "[get_weather(near=[1, {'a': None}], days=-1, exact=true)]",
            "",
            ['{"near": [1, {"a": null}], "days": -1, "exact": true}'],
        ),
        ("gemma4", "<|tool_call>call:now{}<tool_call|><tool_call|>", "", ["{}"]),
        ("mistral", "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}", "", ["{}"]),
        ("phi4", 'functools[{"name": "now", "arguments": {}}]', "", ["{}"]),
        ("granite", '<function_call> {"name": "now", "arguments": {}}', "", ["{}"]),
        ("kimi_k2", "<|tool_call_begin|>functionsnow5<|tool_call_argument_begin|>{}<|tool_call_end|>", None, []),
        ("deepseek_v32", '<｜DSML｜invoke name="now">{"a": 1}</｜DSML｜invoke>', "", ['{"a": 1}']),
        ("harmony", " to=functions.now<|channel|>commentary json<|message|>{}<|call|>", "", ["{}"]),
        ("harmony", "<|channel|>analysis to=functions.now code<|message|>{}", "", ["{}"]),
        ("harmony", "<|channel|>final<|message|>Hi<|return|>", "Hi", []),
        ("harmony", "Hi there", None, []),
        ("harmony", "<|channel|>commentary to=now", None, []),
        ("harmony", "<|channel|><|channel|>final<|message|>Hi", "<|channel|>Hi", []),
    ],
)
def test_quirks_and_malformed_calls(form: str, text: str, content: str | None, arguments: list[str]) -> None:
    """`content` None: all of it is text."""
    found, _, calls = check_cuts(options_of(form), text, max_chars=200)
    assert [one[2] for one in calls] == arguments
    assert found == (text if content is None else content)


def test_harmony_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>think\n<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.calc <|constrain|>json<|message|>"
        '{"expression": "1"}<|call|>'
    )
    assert check_cuts(options_of("harmony"), text) == (
        "I look.",
        "think\n",
        [("call_0", "calc", '{"expression": "1"}')],
    )


def test_ids_of_the_models_own() -> None:
    text = "<|tool_call_begin|>functions.now:3<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert parse(options_of("kimi_k2"), [text])[2] == [("functions.now:3", "now", "{}")]
    assert parse(options_of("mistral"), ["[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}"])[2][0][0] == "abcdefghi"


def test_reading_takes_linear_time() -> None:
    """Openers that begin no call, over and over, and one that seems to for long."""
    for text in ("<tool_call>" * 20_000, '<tool_call>{"a":["' * 10_000, "<tool_call>" + " " * 200_000 + "x"):
        started = time.process_time()
        content, _, calls = parse(options_of("hermes"), [text[at : at + 7] for at in range(0, len(text), 7)])
        assert (content, calls) == (text, [])
        assert time.process_time() - started < 20
