"""Refused requests and their errors. One worker serves the whole file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.worker.conftest import MODEL, Running, RunWorker

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(run_worker: RunWorker) -> AsyncIterator[Running]:
    """A worker on the echoing engine, with all defaults."""
    async with run_worker() as running:
        yield running


CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO}


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temperature": 2.5}, "temperature", "2.5"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"min_p": 2}, "min_p", "2"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "-2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "128"),
        ({"stop": ["x"] * 17}, "stop", "up to 16"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": 3}, "stop", "string"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "run from 0"),
        ({"logit_bias": {"5": 200}}, "logit_bias.5", "-100 to 100"),
        ({"logit_bias": {"-5": 2}}, "logit_bias", "run from 0"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "max_tokens"),
        ({"best_of": 1, "n": 2}, "best_of", "less than n"),
        ({"best_of": 0}, "best_of", "greater than or equal to 1"),
        ({"best_of": 129}, "best_of", "128"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of", "may not exceed n, which is 2"),
        ({"typical_p": 0}, "typical_p", "greater than 0"),
        ({"typical_p": 1.1}, "typical_p", "less than or equal to 1"),
        ({"priority": 101}, "priority", "less than or equal to 100"),
        ({"priority": -101}, "priority", "-100"),
        ({"priority": "high"}, "priority", "integer"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "leave out stream"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "robot"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content", "text part"),
        ({"messages": None}, "messages", "array"),
        ({"model": None}, "model", "string"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.name", "names the function"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages.0.name", "string"),
        ({"add_generation_prompt": 1}, "add_generation_prompt", "true or false"),
        ({"continue_final_message": True}, "continue_final_message", "role user"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "leave it out here"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs", "object"),
        ({"documents": [1]}, "documents.0", "object"),
        ({"documents": [{}] * 5000}, "documents", "4096"),
        ({"prediction": {"type": "content"}}, "prediction.content", "Missing"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction.content", "string"),
        ({"prediction": {"type": "content", "content": "x"}, "n": 2}, "n", "prediction"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-1"),
        ({"truncation_side": "middle"}, "truncation_side", "left"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "run from 0"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids", "integers"),
        ({"allowed_token_ids": [1] * 4097}, "allowed_token_ids", "--max-logit-bias"),
        ({"bad_words": "x"}, "bad_words", "array"),
        ({"bad_words": ["x"] * 129}, "bad_words", "128"),
        ({"bad_words": [" "]}, "bad_words", "blanks"),
        ({"cache_salt": ""}, "cache_salt", "at least 1"),
        ({"cache_salt": "x" * 1025}, "cache_salt", "at most 1024"),
        ({"request_id": "a\nb"}, "request_id", "letters"),
        ({"service_tier": "gold"}, "service_tier", "flex"),
        ({"verbosity": "loud"}, "verbosity", "low"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
        ({"store": "yes"}, "store", "true or false"),
        ({"user": 1}, "user", "string"),
        ({"stream_interval": 0}, "stream_interval", "1"),
        ({"stream": True, "stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation", "true"),
        ({"use_beam_search": True, "stream": True}, "stream", "use_beam_search"),
        ({"use_beam_search": True, "top_p": 0.5}, "top_p", "use_beam_search"),
        ({"use_beam_search": True, "n": 33}, "n", "32"),
        ({"length_penalty": 11}, "length_penalty", "10"),
    ],
)
async def test_errors_name_field_value_and_remedy(
    shared: Running, changes: dict[str, Any], param: str, words: str
) -> None:
    status, body = await shared.post("/v1/chat/completions", CHAT | changes)
    assert status == 400
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]
    assert param.split(".")[0] in body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("chat", {"tools": [{"type": "web_search"}]}, "tools.0"),
        ("chat", {"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ("chat", {"audio": {"voice": "x"}}, "audio"),
        ("chat", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat", {"web_search_options": {}}, "web_search_options"),
        ("chat", {"moderation": {"model": "x"}}, "moderation"),
        ("chat", {"chat_template": "x"}, "chat_template"),
        ("chat", {"prediction": {"type": "content", "content": [{"type": "file"}]}}, "prediction.content"),
        ("chat", {"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
        ("chat", {"guided_decoding_backend": "x"}, "guided_decoding_backend"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ("text", {"suffix": "x"}, "suffix"),
    ],
)
async def test_unsupported_fields_are_refused_by_name(
    shared: Running, path: str, changes: dict[str, Any], param: str
) -> None:
    if path == "chat":
        status, answer = await shared.post("/v1/chat/completions", CHAT | changes)
    else:
        status, answer = await shared.post("/v1/completions", {"model": MODEL, "prompt": "x"} | changes)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unsupported_parameter", param)
    assert f"'{param}'" in answer["error"]["message"] or "Content parts of type" in answer["error"]["message"]


@pytest.mark.parametrize("changes", [{}, {"echo": False}, {"stream": True}])
async def test_max_tokens_zero_is_refused_where_nothing_would_be_returned(
    shared: Running, changes: dict[str, Any]
) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 0}
    status, answer = await shared.post("/v1/completions", body | changes)
    assert (status, answer["error"]["param"]) == (400, "max_tokens")
    assert "echo=true" in answer["error"]["message"]
    status, answer = await shared.post("/v1/completions", body | {"echo": True, "min_tokens": 1})
    assert (status, answer["error"]["param"]) == (400, "min_tokens")


async def test_neutral_and_harmless_values_pass(shared: Running) -> None:
    names = ("temperature", "top_p", "stop", "max_tokens", "n", "seed", "logit_bias", "tools", "response_format")
    body = (
        CHAT
        | dict.fromkeys(names)
        | {
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "service_tier": "auto",
            "stop": [],
            "stream": False,
            "messages": [
                *HELLO,
                {
                    "role": "assistant",
                    "content": "hi",
                    "refusal": None,
                    "annotations": [],
                    "audio": None,
                    "function_call": None,
                    "tool_calls": None,
                },
                *HELLO,
            ],
        }
    )
    status, answer = await shared.post("/v1/chat/completions", body)
    assert (status, answer.get("error")) == (200, None)


async def test_unknown_fields_are_logged_once_and_counted(shared: Running, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        status, _ = await shared.post("/v1/chat/completions", CHAT | {"brand_new": 1})
        assert status == 200
    assert caplog.text.count("brand_new") == 1
    async with shared.http.get(shared.url + "/metrics") as response:
        assert 'fastserve_worker_unknown_fields_total{field="brand_new"} 2.0' in await response.text()


async def test_unknown_nested_fields_are_reported_with_their_path(
    shared: Running, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{"role": "user", "content": "hello", "mood": "good"}] * 3
    body = {"messages": messages, "stream_options": {"colour": 1, "continuous_usage_stats": False}, "stream": True}
    async with shared.http.post(shared.url + "/v1/chat/completions", json=CHAT | body) as response:
        assert response.status == 200
        await response.read()
    assert caplog.text.count("'messages.mood'") == caplog.text.count("'stream_options.colour'") == 1
    async with shared.http.get(shared.url + "/metrics") as response:
        text = await response.text()
    assert 'fastserve_worker_unknown_fields_total{field="messages.mood"} 1.0' in text
    assert 'fastserve_worker_unknown_fields_total{field="stream_options.colour"} 1.0' in text


async def test_too_many_fields_are_refused(shared: Running) -> None:
    many = {f"field{i}": i for i in range(2000)}
    status, answer = await shared.post("/v1/chat/completions", CHAT | many)
    assert (status, answer["error"]["message"][:28]) == (400, "The request has 2002 fields.")
    body = {"messages": [{"role": "user", "content": "hello", **many}]}
    status, answer = await shared.post("/v1/chat/completions", CHAT | body)
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "at most 1024 fields, not 2002" in answer["error"]["message"]


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, "x"], {"a": 1}, [-1], [10**7], True, None])
async def test_invalid_prompts(shared: Running, prompt: Any) -> None:
    status, answer = await shared.post("/v1/completions", {"model": MODEL, "prompt": prompt})
    assert (status, answer["error"]["param"]) == (400, "prompt")


async def test_other_errors(shared: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="other") as caught:
        await shared.openai.chat.completions.create(model="other", messages=HELLO)
    assert caught.value.code == "model_not_found"
    async with shared.http.post(shared.url + "/v1/chat/completions", data=b"{not json") as response:
        assert response.status == 400
        assert "not valid JSON" in (await response.json())["error"]["message"]
    async with shared.http.post(shared.url + "/v1/completions", data=b"[1]") as response:
        assert response.status == 400
    status, answer = await shared.post("/v1/completions", {"model": MODEL})
    assert (status, answer["error"]["code"]) == (400, "missing_required_parameter")
    assert (await shared.post("/nowhere", {}))[0] == 404
