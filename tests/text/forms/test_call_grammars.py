"""Grammars of calls accept what the forms read, and nothing that the schemas forbid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer

from fastserve.demo import demo_model_path
from fastserve.openai.tools import FunctionTool, ToolUse
from fastserve.text.forms.find import FORMS
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.answer_forms import AnswerForms
from tests.text.forms.texts import FUNCTIONS, RENDER

OSLO = ("get_weather", {"city": "Oslo"})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(demo_model_path()))


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return LLTokenizer((Path(demo_model_path()) / "tokenizer.json").read_text(encoding="utf-8"))


def accepts(vocabulary: LLTokenizer, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    matcher = LLMatcher(vocabulary, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def grammar_of(tokenizer: Tokenizer, form: str, use: ToolUse) -> str:
    return AnswerForms("", tokenizer, form)._call_grammar(use, FORMS[form])


FUNCTION_TOOLS = [FunctionTool(name, schema) for name, schema in FUNCTIONS.items()]


@pytest.mark.parametrize("form", ["hermes", "mistral", "mistral_v11", "phi4", "granite", "kimi_k2", "deepseek_v3"])
def test_calls_that_must_come(form: str, tokenizer: Tokenizer, vocabulary: LLTokenizer) -> None:
    grammar = grammar_of(tokenizer, form, ToolUse([], FUNCTION_TOOLS, is_required=True))
    single = grammar_of(tokenizer, form, ToolUse([], FUNCTION_TOOLS, is_required=True, is_parallel=False))
    one, two = RENDER[form]([OSLO]), RENDER[form]([OSLO, ("now", {})])
    assert accepts(vocabulary, tokenizer, grammar, one)
    assert accepts(vocabulary, tokenizer, grammar, two)
    assert accepts(vocabulary, tokenizer, single, one)
    assert not accepts(vocabulary, tokenizer, single, two)
    for text in ("Hi.", RENDER[form]([("launch", {})]), RENDER[form]([("get_weather", {"city": 1})]), one[:-12]):
        assert not accepts(vocabulary, tokenizer, grammar, text)


def test_strict_functions_that_may_be_called(tokenizer: Tokenizer, vocabulary: LLTokenizer) -> None:
    tools = [FunctionTool("now", FUNCTIONS["now"]), FunctionTool("get_weather", FUNCTIONS["get_weather"], True)]
    grammar = grammar_of(tokenizer, "hermes", ToolUse([], tools))
    render = RENDER["hermes"]
    for text in ("Hi there.", "", "So: " + render([OSLO]), render([("now", {"any": json.loads("[1]")})])):
        assert accepts(vocabulary, tokenizer, grammar, text), text
    assert not accepts(vocabulary, tokenizer, grammar, render([("get_weather", {"city": 1})]))
    assert grammar_of(tokenizer, "hermes", ToolUse([], tools[:1])) == "", "nothing to enforce"
