"""Parts of answers in every form of calls are the same for every cut of the text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from fastserve.text.forms.find import FORMS, make_parser
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
    content, reasoning, calls = "", "", []
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
