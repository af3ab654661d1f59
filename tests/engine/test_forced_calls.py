"""Calls and formats that grammars enforce, on the real engine: what is not cut off is as the request demands."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastserve.engine.core import EngineCore
from fastserve.openai.body import RequestBounds
from fastserve.openai.chat import ChatRequest
from fastserve.openai.generation import check_request
from fastserve.text.grammar import of_json_schema
from fastserve.text.parts import ReasoningPart, TextPart, ToolCallPart
from fastserve.text.reasoning import REASONING
from fastserve.worker.answer_forms import AnswerForms
from fastserve.worker.choice import OutputOptions

from .conftest import SHAPE
from .test_engine_equality import Answer, make_core
from .test_grammar import END, FOLDER, PERSON, TOKENIZER, answer_all, request

BOUNDS = RequestBounds()
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": PLACE, "now": EMPTY}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
OPENED = "<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def random_core(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    """A model that writes anything, with the demo model's tokens."""
    path = str(tmp_path_factory.mktemp("random"))
    shape = SHAPE | {"vocab_size": TOKENIZER.vocab_size, "max_position_embeddings": 2048, "eos_token_id": END}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32).save_pretrained(path)
    return make_core(path, tokenizer_dir=FOLDER, speculative_method="off")


def forms(form: str = "hermes", reasoning: str = "qwen3") -> AnswerForms:
    return AnswerForms("", TOKENIZER, form, reasoning)


Parsed = tuple[str, str, list[tuple[str, str]]]
"""Reasoning, text, and calls with their arguments."""


def answers(
    core: EngineCore,
    forms: AnswerForms,
    fields: dict[str, Any],
    count: int,
    *,
    prompt: str = "<|im_start|>assistant\n",
    wanted: str = "",
    max_tokens: int = 300,
) -> list[tuple[Parsed, Answer]]:
    """Generate answers to a chat with these fields, and parse them."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    chat = check_request(ChatRequest, body, BOUNDS)
    form = forms.of(chat, chat.tool_use(), prompt, "", "r", OutputOptions(continues_prompt=False), wanted)
    requests = [
        request(f"f{at}", form.grammar, seed=at, temperature=1.0, max_tokens=max_tokens, thinking=form.thinking)
        for at in range(count)
    ]
    found = []
    for answer in answer_all(core, requests).values():
        assert answer.finish_reason in ("stop", "length")
        assert form.output.parser is not None
        parser = form.output.parser(0)
        ids = [token_id for token_id in answer.token_ids if token_id not in TOKENIZER.eos_token_ids]
        text = b"".join(map(TOKENIZER.token_bytes, ids)).decode(errors="replace")
        parts = [*parser.push(text), *parser.finish(cut_off=answer.finish_reason == "length")]
        calls: list[tuple[str, str]] = []
        for part in parts:
            if isinstance(part, ToolCallPart):
                if part.name:
                    calls.append((part.name, ""))
                calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
        thought = "".join(part.text for part in parts if isinstance(part, ReasoningPart))
        said = "".join(part.text for part in parts if isinstance(part, TextPart))
        found.append(((thought, said, calls), answer))
    return found


def check(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "mistral", "qwen3_coder", "kimi_k2", "deepseek_v3"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_are_declared_ones_with_valid_arguments(random_core: EngineCore, form: str, choice: Any) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    found = answers(random_core, forms(form, "none"), fields, 8)
    whole = [calls for (_, _, calls), answer in found if answer.finish_reason == "stop"]
    assert len(whole) > 4
    for calls in whole:
        assert [name for name, _ in calls] == (["get_weather"] if choice is NAMED else [calls[0][0]])
        check(calls)


def test_strict_calls_that_may_come_are_valid(random_core: EngineCore) -> None:
    for (_, _, calls), answer in answers(random_core, forms("hermes", "none"), {"tools": TOOLS}, 8):
        if answer.finish_reason == "stop":
            check(calls)


@pytest.mark.parametrize("prompt", [OPENED, "<|im_start|>assistant\n"], ids=["opened", "may begin"])
def test_a_format_begins_after_the_thinking(random_core: EngineCore, prompt: str) -> None:
    found = answers(random_core, forms(), {}, 8, prompt=prompt, wanted=of_json_schema(PERSON))
    for (thought, text, _), answer in found:
        assert thought or prompt != OPENED
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("form", ["hermes", "qwen3_coder"])
def test_a_format_leaves_room_for_calls_that_may_come(random_core: EngineCore, form: str) -> None:
    found = answers(random_core, forms(form, "none"), {"tools": TOOLS}, 12, wanted=of_json_schema(PERSON))
    whole = [parsed for parsed, answer in found if answer.finish_reason == "stop"]
    assert whole
    for _, text, calls in whole:
        if form == "hermes" and calls:
            check(calls)
        elif not calls and not text.startswith("<"):  # marks of a call that breaks off are text
            jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("reasoning", ["qwen3", "granite"])
@pytest.mark.parametrize("is_opened", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 15])
def test_a_budget_of_thinking_holds_where_the_end_is_several_tokens(
    random_core: EngineCore, reasoning: str, is_opened: bool, budget: int
) -> None:
    marks = REASONING[reasoning]
    assert len(TOKENIZER.encode(marks.ends[0], add_special_tokens=False)) > 1
    prompt = f"<|im_start|>assistant\n{marks.begins[0] if is_opened else ''}"
    fields = {"thinking_token_budget": budget, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    found = answers(random_core, forms("hermes", reasoning), fields, 6, prompt=prompt)
    num_whole = 0
    for (thought, _, calls), answer in found:
        # Some more tokens may have to end a character; texts are split anew in another way.
        assert len(thought.encode()) <= 16 * (budget + 4)
        if answer.finish_reason == "stop":
            num_whole += 1
            assert len(calls) == 1
            check(calls)
    assert num_whole > 3
