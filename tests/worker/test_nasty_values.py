"""Any invalid value in any field gives a 400 that names it in JSON's terms, and never a 500."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.worker.conftest import MODEL, Running, RunWorker

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIBRARY_WORDS = re.compile(
    r"\bNone\b|\bTrue\b|\bFalse\b|\binf\b|\bnan\b|\bdict\b|\btuple\b|\bstr\b|\bint\b|\bbool\b|\bfloat\b|pydantic"
    r"|msgspec|\$\.|\[key\]|Traceback|truncated|function-|Input should|recursion"
)
SURROGATE, TOO_LARGE, LONG_INTEGER, NAN = '"\\ud800"', "1e400", "1" + "0" * 5000, "NaN"
NASTY = {
    "null": "null",
    "true": "true",
    "string": '"1"',
    "word": '"half a word"',
    "empty": '""',
    "surrogate": SURROGATE,
    "swapped surrogates": '"a\\udc00\\ud800b"',
    "control": '"\\u0000\\u001b[31m\\u202e"',
    "long": json.dumps("x" * 20_000),
    "NaN": NAN,
    "-Infinity": "-Infinity",
    "too large": TOO_LARGE,
    "wide integer": str(10**100),
    "long integer": LONG_INTEGER,
    "negative": "-7",
    "fraction": "1.5",
    "array": "[]",
    "array of nulls": "[null, null]",
    "array of arrays": "[[[]]]",
    "many": "[" + "0," * 50_000 + "0]",
    "object": "{}",
    "object with nonsense": '{"abc": "x", "5": null}',
    "deep": "[" * 200 + "]" * 200,
    "deep objects": '{"a":' * 200 + "1" + "}" * 200,
}
NEVER = {"surrogate", "swapped surrogates", "NaN", "-Infinity", "too large"}
"""Invalid even in fields of any type, since they are not valid JSON or Unicode. The error names the field."""
TOO_DEEP = {"deep", "deep objects"}
BOOLEANS = ("stream", "include_stop_str_in_output", "ignore_eos")
NUMBERS = (
    *("n", "best_of", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "top_logprobs"),
    *("prompt_logprobs", "priority"),
)
NO_NUMBER = {"true", "string", "word", "empty", "control", "long", "wide integer", "long integer", "array", "object"}
NO_BOOLEAN = (NO_NUMBER - {"true"}) | {"negative", "fraction"}
CHAT = {"model": json.dumps(MODEL), "messages": '[{"role": "user", "content": "hi"}]', "max_tokens": "2"}
COMPLETION = {"model": json.dumps(MODEL), "prompt": '"hi"', "max_tokens": "2"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(run_worker: RunWorker) -> AsyncIterator[Running]:
    async with run_worker() as running:
        yield running


def body_of(fields: dict[str, str]) -> bytes:
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


async def post(running: Running, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    async with running.http.post(running.url + path, data=body, headers={"Content-Type": "application/json"}) as answer:
        return answer.status, await answer.json(content_type=None)


def check(status: int, answer: dict[str, Any], *, names: str | None = None) -> None:
    assert status in (200, 400, 404), answer
    if status != 200:
        message = answer["error"]["message"]
        assert len(message) < 500, message
        assert message.isprintable()
        assert LIBRARY_WORDS.search(message) is None, message
        if names is not None:
            assert str(answer["error"]["param"]).split(".")[0] == names, answer


@pytest.mark.parametrize("field", [*NUMBERS, *BOOLEANS, "stop", "stop_token_ids", "logit_bias", "logprobs", "messages"])
async def test_each_value_in_each_field_of_a_chat(shared: Running, field: str) -> None:
    for kind, value in NASTY.items():
        if (field, kind) == ("stream", "true"):
            continue
        status, answer = await post(shared, "/v1/chat/completions", body_of(CHAT | {field: value}))
        check(status, answer, names=None if kind in TOO_DEEP or status == 200 else field)
        refused = NEVER | TOO_DEEP
        if field in NUMBERS:
            refused |= NO_NUMBER
        elif field in BOOLEANS:
            refused |= NO_BOOLEAN
        if kind in refused:
            assert status == 400, (field, kind)
        if kind in NEVER | (refused - TOO_DEEP):
            assert answer["error"]["param"].split(".")[0] == field, (kind, answer)


@pytest.mark.parametrize("field", ["prompt", "model", "suffix", "user", "metadata", "stream_options", "never_heard_of"])
async def test_each_value_in_other_fields_of_a_completion(shared: Running, field: str) -> None:
    for kind, value in NASTY.items():
        status, answer = await post(shared, "/v1/completions", body_of(COMPLETION | {field: value}))
        check(status, answer, names=field if status == 400 and kind not in TOO_DEEP else None)
        # Fields without effect are only checked to be valid JSON.
        has_effect = field not in ("user", "metadata", "never_heard_of")
        if kind in NEVER | TOO_DEEP and (has_effect or kind != "too large"):
            assert status == 400, kind


MESSAGE_FIELDS = ("role", "content", "name", "tool_call_id", "tool_calls", "reasoning_content", "refusal", "audio")


@pytest.mark.parametrize("field", MESSAGE_FIELDS)
async def test_each_value_in_each_field_of_a_message(shared: Running, field: str) -> None:
    for kind, value in NASTY.items():
        message = body_of({"role": '"assistant"', "content": '"hi"'} | {field: value}).decode()
        body = body_of(CHAT | {"messages": f'[{{"role": "user", "content": "a"}}, {message}]'})
        status, answer = await post(shared, "/v1/chat/completions", body)
        check(status, answer)
        if status == 400 and kind not in TOO_DEEP:
            about_all = kind == "many" or answer["error"]["code"] == "context_length_exceeded"
            assert answer["error"]["param"].startswith("messages" if about_all else f"messages.1.{field}"), answer
        if kind in NEVER:
            assert status == 400, kind


TOOL_CALLS = (
    '[{"type": "function", "id": "1", "function": {"name": "f", "arguments": %s}}]',
    '[{"type": "function", "id": "1", "function": {"name": %s, "arguments": "{}"}}]',
    '[{"type": "function", "id": %s, "function": {"name": "f", "arguments": "{}"}}]',
    '[{"function": %s}]',
    "[%s]",
)


@pytest.mark.parametrize("call", TOOL_CALLS)
async def test_each_value_in_each_field_of_a_tool_call(shared: Running, call: str) -> None:
    texts = [json.dumps(value) for value in NASTY.values() if "\\ud" not in value and "\\udc" not in value]
    for value in [*NASTY.values(), *(texts if "arguments" in call else [])]:
        message = body_of({"role": '"assistant"', "content": "null", "tool_calls": call % value}).decode()
        body = body_of(CHAT | {"messages": f'[{{"role": "user", "content": "a"}}, {message}]'})
        status, answer = await post(shared, "/v1/chat/completions", body)
        check(status, answer, names="messages" if status == 400 and answer["error"]["param"] else None)


@pytest.mark.parametrize(
    "field",
    [
        *("prompt", "temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("stop", "stop_token_ids", "max_new_tokens", "echo", "logprobs", "best_of", "use_beam_search", "images"),
    ],
)
async def test_each_value_on_fastchats_routes(shared: Running, field: str) -> None:
    for kind, value in NASTY.items():
        fields = {"prompt": '"hi"', "max_new_tokens": "2"} | {field: value}
        status, record = await post(shared, "/worker_generate", body_of(fields))
        assert status == 200, (kind, record)
        assert record["error_code"] in (0, 40302, 40303, 50001), (kind, record)
        if record["error_code"]:
            assert record["error_code"] != 50001, (kind, record)
            assert len(record["text"]) < 500
            assert LIBRARY_WORDS.search(record["text"]) is None, record
        if kind in NEVER | TOO_DEEP:
            assert record["error_code"] == 40302, (kind, record)


@pytest.mark.parametrize("kind", NASTY)
async def test_each_value_as_the_whole_body(shared: Running, kind: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/count_token"):
        status, answer = await post(shared, path, NASTY[kind].encode())
        assert status == 400, (path, answer)
        check(status, answer)


async def test_bodies_that_are_no_json(shared: Running) -> None:
    for body, words in (
        (b"", "it is empty"),
        (b'{"model": ', "ends too early"),
        (b'{"model": "x",}', "at byte 14"),
        (b'{"model": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"model": "\xff"}', "not valid UTF-8"),
        (b'\xef\xbb\xbf{"model": 1}', "at byte 0"),
        (b'{"\\ud800": 1}', "surrogate"),
    ):
        for path in ("/v1/chat/completions", "/v1/completions", "/count_token"):
            status, answer = await post(shared, path, body)
            assert status == 400
            assert words in answer["error"]["message"], answer
            check(status, answer)
        status, record = await post(shared, "/worker_generate", body)
        assert (status, record["error_code"]) == (200, 40302)
        assert words in record["text"]


async def test_numbers_are_numbers_and_integers_have_no_point(shared: Running) -> None:
    for field, value in (("n", "2"), ("max_tokens", "3"), ("temperature", "1"), ("top_p", "1"), ("seed", "7")):
        status, answer = await post(shared, "/v1/chat/completions", body_of(CHAT | {field: value}))
        assert status == 200, answer
    wrong = [*itertools.product(("n", "top_p", "temperature"), ("true", '"1"', "[1]"))]
    for field, value in [*wrong, ("n", "2.0"), ("max_tokens", "3.0"), ("seed", "7.0")]:
        status, answer = await post(shared, "/v1/chat/completions", body_of(CHAT | {field: value}))
        assert (status, answer["error"]["param"]) == (400, field)
        assert f": {value}." in answer["error"]["message"]


async def test_a_tool_message_names_the_call_that_it_answers(shared: Running) -> None:
    for value in ("null", '""'):
        tool = body_of({"role": '"tool"', "content": '"2"', "tool_call_id": value}).decode()
        body = body_of(CHAT | {"messages": f'[{{"role": "user", "content": "a"}}, {tool}]'})
        status, answer = await post(shared, "/v1/chat/completions", body)
        assert (status, answer["error"]["param"]) == (400, "messages.1.tool_call_id")
        assert answer["error"]["code"] == "missing_required_parameter"


async def test_long_foreign_names_are_not_repeated_in_full(shared: Running) -> None:
    name = "x" * 100_000
    for fields in (CHAT | {"model": json.dumps(name)}, CHAT | {name: '"\\ud800"'}, CHAT | {"stop": json.dumps(name)}):
        status, answer = await post(shared, "/v1/chat/completions", body_of(fields))
        assert status in (400, 404)
        assert len(json.dumps(answer)) < 2000
