"""Formats of answers at the door: each form, and refusals that say where and why."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fastserve.errors import FastserveError, InvalidRequestError, UnsupportedCapabilityError
from fastserve.openai.body import RequestBounds
from fastserve.openai.completions import CompletionRequest
from fastserve.openai.generation import check_request
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.grammars import GrammarMaker, preparing_bytes
from fastserve.worker.prompt_pool import INLINE_BYTES

from .conftest import RunWorker

BOUNDS = RequestBounds()


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> GrammarMaker:
    return GrammarMaker(
        tokenizer,
        vocab_size=tokenizer.vocab_size,
        end_token_ids=tokenizer.eos_token_ids,
        max_bytes=65_536,
        fuel=300_000,
        max_cached_bytes=10_000,
    )


def grammar_of(maker: GrammarMaker, fields: dict[str, Any]) -> str:
    request = check_request(CompletionRequest, {"model": "m", "prompt": "x", **fields}, BOUNDS)
    wanted = request.answer_format(BOUNDS)
    return "" if wanted is None else maker.of(wanted)


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value, "strict": True}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object", "schema": {"type": "integer"}}},
        {"response_format": {"type": "json_schema", "schema": {"type": "integer"}}},
        schema({"type": "integer"}),
        schema(True),
        schema({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}, "type": "array"}}, "$ref": "#/$defs/a"}),
        {"structured_outputs": {"json": '{"type": "integer"}', "disable_any_whitespace": True}},
        {"structured_outputs": {"regex": "a/b+\n"}},
        {"structured_outputs": {"choice": ["a", 'b"']}},
        {"structured_outputs": {"grammar": 'start: "a" | "b"'}},
        {"structured_outputs": {"json_object": True}},
        {"guided_json": {"type": "integer"}, "guided_whitespace_pattern": " ?"},
        {"guided_regex": "(a*)*b"},
        {"guided_choice": ["yes", "no"]},
        {"guided_grammar": 'root ::= "a" [b-d]+'},
        {"grammar": 'root ::= item ("," item)*\nitem ::= [0-9]{1,3}'},
        {"ebnf": 'root ::= "x" [\\u00e9] "\\u0041"'},
        {"json_schema": '{"type": "null"}'},
        {"regex": "a{100000}"},
    ],
)
def test_each_form_becomes_a_grammar(maker: GrammarMaker, fields: dict[str, Any]) -> None:
    assert "start:" in grammar_of(maker, fields)


def test_text_is_no_format(maker: GrammarMaker) -> None:
    assert grammar_of(maker, {"response_format": {"type": "text"}}) == ""


ROOT = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        (schema(5), ROOT, "object"),
        (schema({"type": "strin"}), ROOT, "strin"),
        (
            schema({"properties": {"a": {"$ref": "http://127.0.0.1/x"}}}),
            f"{ROOT}.properties.a.$ref",
            "nothing is fetched",
        ),
        (schema({"properties": {"a": {"items": {"not": {}}}}}), f"{ROOT}.properties.a.items", "not"),
        (
            schema({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(?=x)"}]}),
            f"{ROOT}.anyOf.1",
            "look-around",
        ),
        (schema(False), ROOT, "grammar"),
        (schema({"enum": ["x" * 70_000]}), ROOT, "--max-grammar-bytes"),
        (schema({"type": "object", "properties": {f"p{n}": {} for n in range(2000)}}), ROOT, "items"),
        ({"structured_outputs": {}}, "structured_outputs", "json_object"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "json and regex"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice", "strings"),
        ({"guided_json": '{"type":'}, "guided_json", "JSON"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
        ({"grammar": 'root ::= "a'}, "grammar", "nd of input"),
        ({"grammar": 'root ::= "a" nobody'}, "grammar", "nobody"),
        ({"grammar": 'root ::= "a" item\nitem ::= item "b"'}, "grammar", "no text matches"),
        ({"guided_regex": r"[^\x00-\x{10FFFF}]"}, "guided_regex", "no text matches"),
        ({"ebnf": "root ::= " + "(" * 5000}, "ebnf", "nested"),
        ({"guided_grammar": "start: (" + "(" * 500}, "guided_grammar", ""),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "One of them".lower()),
    ],
)
def test_a_refusal_names_the_place_and_the_reason(
    maker: GrammarMaker, fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        grammar_of(maker, fields)
    assert caught.value.param == param
    assert f"'{param}'" in caught.value.message
    assert says in caught.value.message
    assert len(caught.value.message) < 700


HOSTILE = [
    schema({"allOf": [{"type": "string", "pattern": f".*{chr(97 + n)}.*"} for n in range(12)]}),
    {"guided_grammar": "start: A0\n" + "".join(f"A{n}: A{n + 1} A{n + 1}\n" for n in range(30)) + 'A30: "x"'},
    {"guided_grammar": "start: a{100}\na: /b+/"},
    {"guided_grammar": '%llguidance {"no_forcing": false}\nstart: a{100}\na: /b+/'},
    {"guided_regex": "(((a{1,99}){1,99}){1,99}){1,99}"},
    schema({"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}),
    schema({"type": "string", "pattern": "^(a+)+$", "minLength": 10**6}),
]


@pytest.mark.parametrize("fields", HOSTILE)
def test_a_hostile_format_takes_a_bounded_time(maker: GrammarMaker, fields: dict[str, Any]) -> None:
    begin_s = time.thread_time()
    try:
        grammar_of(maker, fields)
    except FastserveError as error:
        assert isinstance(error, InvalidRequestError)  # noqa: PT017
    assert time.thread_time() - begin_s < 10


def test_what_is_known_to_compile_is_bounded(maker: GrammarMaker) -> None:
    for at in range(200):
        grammar_of(maker, {"guided_choice": [f"choice {at}", "x" * 200]})
    assert maker._known_bytes == sum(map(len, maker._known)) <= 10_000


def test_a_body_with_a_format_gets_a_thread() -> None:
    assert preparing_bytes(b'{"messages": []}') < INLINE_BYTES
    fields = ("response_format", "structured_outputs", "guided_json", "grammar", "regex", "ebnf", "json_schema")
    for name in (*fields, "format", "output_format", "strict", "tool_choice"):
        assert preparing_bytes(f'{{"{name}": 1}}'.encode()) > INLINE_BYTES


def test_a_model_whose_tokens_have_no_bytes_refuses_formats_by_name(tokenizer: Tokenizer) -> None:
    without_end = GrammarMaker(
        tokenizer, vocab_size=2048, end_token_ids=(), max_bytes=1000, fuel=1000, max_cached_bytes=1000
    )
    with pytest.raises(UnsupportedCapabilityError, match="end token"):
        grammar_of(without_end, {"regex": "a"})


async def test_a_format_reaches_the_engine_as_a_grammar(run_worker: RunWorker) -> None:
    grammars: list[str] = []

    def script(request: Any, info: Any) -> list[int]:
        grammars.append(request.params.grammar)
        return [5]

    async with run_worker(script) as running:
        body = {"model": "fastserve-demo", "prompt": "x", **schema({"type": "integer"})}
        status, answer = await running.post("/v1/completions", body)
        assert status == 200, answer
        for name, value in (("min_tokens", 1), ("ignore_eos", True)):
            status, answer = await running.post("/v1/completions", {**body, name: value})
            assert (status, answer["error"]["param"]) == (400, name)
    assert len(grammars) == 1
    assert "%json" in grammars[0]
