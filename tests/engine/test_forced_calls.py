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
    requests = [request(f"f{at}", form.grammar, seed=at, temperature=1.0, max_tokens=max_tokens) for at in range(count)]
    found = []
    for answer in answer_all(core, requests).values():
        assert answer.finish_reason in ("stop", "length")
        assert form.output.parser is not None
        parser = form.output.parser(0)
        ids = [token_id for token_id in answer.token_ids if token_id not in TOKENIZER.eos_token_ids]
        detokenizer = TOKENIZER.detokenizer((), skip_special_tokens=False)
        text = detokenizer.push(ids) + detokenizer.finish()
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
@pytest.mark.parametrize("budget", [None, 12])
def test_a_format_begins_after_the_thinking(random_core: EngineCore, prompt: str, budget: int | None) -> None:
    fields = {"thinking_token_budget": budget} if budget else {}
    found = answers(random_core, forms(), fields, 8, prompt=prompt, wanted=of_json_schema(PERSON))
    whole = [parsed for parsed, answer in found if answer.finish_reason == "stop"]
    for _, text, _ in whole:
        jsonschema.validate(json.loads(text), PERSON)
    assert whole or (budget is None and prompt == OPENED)
