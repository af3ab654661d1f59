"""Anthropic's Messages API through the API server, with Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import pytest

from fastserve.engine.fake import Script
from fastserve.text.tokenizer import Tokenizer
from tests.dialects.conftest import Serve, Served
from tests.worker.conftest import MODEL

TURN: anthropic.types.MessageParam = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": [TURN]}
KEY = "a-key-of-a-client"

DOCS = Path(__file__).parents[2] / "docs" / "anthropic.md"


@pytest.fixture
async def served(serve: Serve, say: Callable[[str], Script]) -> AsyncIterator[Served]:
    async with serve(say("hello there, 世界"), api_keys=(KEY,)) as made:
        yield made


def client_of(served: Served, **options: Any) -> anthropic.AsyncAnthropic:
    options = {"api_key": KEY, **options}
    return anthropic.AsyncAnthropic(base_url=served.url, max_retries=0, **options)


async def test_an_answer_of_anthropics_client_has_its_blocks_usage_and_reason(served: Served) -> None:
    client = client_of(served)
    answer = await client.messages.create(**BODY, system="be kind")
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "hello there, 世界"}]
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == (
        "assistant",
        MODEL,
        "end_turn",
        None,
    )
    counted = await client.messages.count_tokens(model=MODEL, messages=[TURN], system="be kind")
    usage = answer.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens
    assert usage.output_tokens > 0


async def test_streams_hold_the_same_as_whole_answers(served: Served) -> None:
    client = client_of(served)
    for more in ({}, {"stop_sequences": ["xyz", "there"]}, {"max_tokens": 2}):
        whole = await client.messages.create(**{**BODY, **more})
        async with client.messages.stream(**{**BODY, **more}) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "".join(block.text for block in whole.content if block.type == "text")
        for name in ("content", "stop_reason", "stop_sequence", "model", "role"):
            left, right = getattr(final, name), getattr(whole, name)
            if name == "content":
                left, right = [block.text for block in left], [block.text for block in right]
            assert left == right, (name, more)
        assert final.usage.output_tokens == whole.usage.output_tokens
    reasons = [(await client.messages.create(**{**BODY, **more})).stop_reason for more in ({"max_tokens": 2},)]
    assert reasons == ["max_tokens"]


async def test_the_example_of_the_docs_runs(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    example = DOCS.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    code = example.replace("http://localhost:8888", served.url).replace('api_key="none"', f'api_key="{KEY}"')
    await asyncio.to_thread(exec, code, {})
    assert capsys.readouterr().out.strip() == "hello there, 世界"


async def test_the_synchronous_client_streams_too(served: Served) -> None:
    client = anthropic.Anthropic(base_url=served.url, auth_token=KEY, api_key=None, max_retries=0)

    def ask() -> list[str]:
        return [event.type for event in client.messages.create(**BODY, stream=True)]

    kinds = await asyncio.to_thread(ask)
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


async def test_models_are_listed_in_anthropics_form_for_its_clients(served: Served) -> None:
    client = client_of(served)
    (card,) = [card async for card in client.models.list()]
    assert (card.id, card.type, card.display_name) == (MODEL, "model", MODEL)
    assert (await client.models.retrieve(MODEL)).created_at == card.created_at
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("none-such")
    async with served.http.get(served.url + "/v1/models", headers={"x-api-key": KEY}) as response:
        assert (await response.json())["data"][0]["object"] == "model"


REFUSALS: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"model": "none-such"}, 404, "not_found_error", "model"),
    ({"model": None}, 400, "invalid_request_error", "model"),
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": "20"}, 400, "invalid_request_error", "max_tokens"),
    ({"messages": []}, 400, "invalid_request_error", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request_error", "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_request_error", "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, None, "messages.0.content.0"),
    ({"system": 5}, 400, "invalid_request_error", None),
    ({"system": [{"type": "image"}]}, 400, "invalid_request_error", "system.0"),
    ({"stop_sequences": "x"}, 400, "invalid_request_error", "stop_sequences"),
    ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
    ({"temperature": 3}, 400, "invalid_request_error", "temperature"),
    ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools.0.input_schema"),
    ({"tools": [{"type": "web_search_20250305", "name": "f"}]}, 400, None, "tools.0.type"),
    ({"tool_choice": {"type": "all"}}, 400, "invalid_request_error", "tool_choice"),
    ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "thinking.budget_tokens"),
    ({"thinking": "yes"}, 400, "invalid_request_error", "thinking"),
    ({"output_config": {"format": {"type": "xml"}}}, 400, None, "output_config.format"),
    ({"mcp_servers": [{"url": "x"}]}, 400, None, "mcp_servers"),
    ({"thread": {"type": "create"}}, 400, None, "thread"),
]
"""Changes of BODY: status, type and field of the error."""


async def test_refusals_have_anthropics_shape_and_name_the_field(served: Served) -> None:
    headers = {"x-api-key": KEY, "x-request-id": "r-1"}
    for change, status, kind, param in REFUSALS:
        for stream in (False, True):
            body = {name: value for name, value in (BODY | {"stream": stream} | change).items() if value is not None}
            code, answer = await served.post("/v1/messages?beta=true", body, **headers)
            assert (code, answer["type"], answer["request_id"]) == (status, "error", "r-1"), answer
            assert answer["error"]["type"] == (kind or "invalid_request_error")
            assert param is None or answer["error"]["param"] == param, answer


async def test_the_tool_runner_sends_all_messages_where_the_server_keeps_none(
    serve: Serve, tokenizer: Tokenizer
) -> None:
    """It sends only the new ones, unless the server refuses the field `thread` as Anthropic's does."""
    texts = ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "sunny"]
    cities: list[str] = []

    @anthropic.beta_async_tool
    async def get_weather(city: str) -> str:
        """Get the weather in a city"""
        cities.append(city)
        return "sunny, 21 degrees"

    async with serve(lambda request, info: tokenizer.encode(texts[len(cities)], add_special_tokens=False)) as served:
        runner = client_of(served).beta.messages.tool_runner(**BODY | {"max_tokens": 100}, tools=[get_weather])
        last = await runner.until_done()
    assert cities == ["Paris"]
    assert [block.text for block in last.content if block.type == "text"] == ["sunny"]


async def test_the_api_servers_own_errors_have_anthropics_shape(served: Served) -> None:
    for key in (None, "wrong"):
        code, answer = await served.post("/v1/messages", BODY, **({} if key is None else {"x-api-key": key}))
        assert (code, answer["type"], answer["error"]["type"]) == (401, "error", "authentication_error")
    with pytest.raises(anthropic.AuthenticationError) as refused:
        await client_of(served, api_key="wrong").messages.create(**BODY)
    assert refused.value.request_id
    for path, method, status in (("/v1/messages/batches", "POST", 404), ("/v1/messages", "GET", 405)):
        async with served.http.request(method, served.url + path, headers={"x-api-key": KEY}) as response:
            answer = await response.json()
            assert (response.status, answer["type"], response.headers["request-id"]) == (
                status,
                "error",
                answer["request_id"],
            )


async def test_no_worker_is_overloaded_and_a_lost_one_ends_the_stream_with_an_error(serve: Serve) -> None:
    async with serve(lambda request, info: [300] * 500, token_s=0.02) as served:
        client = client_of(served)
        stream = await client.messages.create(**{**BODY, "max_tokens": 200}, stream=True)
        await anext(stream)
        served.worker.engine.die()
        with pytest.raises(anthropic.APIStatusError) as broken:
            [event async for event in stream]
        assert broken.value.body["type"] == "error"  # type: ignore[index]
        await served.worker.worker.deregister()
        async with served.http.post(served.url + "/v1/messages", json=BODY) as response:
            answer = await response.json()
            assert (response.status, answer["error"]["type"]) == (529, "overloaded_error"), answer
            assert response.headers["retry-after"]


# ---- bodies of agents -------------------------------------------------------------------------------------------

AGENT_HEADERS = {
    "x-api-key": KEY,
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "code-agent-2025-02-19,interleaved-thinking-2025-05-14,not-known-2030-01-01",
}
AGENT: dict[str, Any] = {
    **BODY,
    "system": [
        {"type": "text", "text": "You write code.", "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "org"}}
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "abc"},
                {"type": "text", "text": "Hello."},
            ],
        },
        {"role": "system", "content": "The time is five."},
        {"role": "ctx", "content": "go on"},
    ],
    "metadata": {"user_id": "u"},
    "context_management": {"edits": [{"type": "clear_tool_uses", "keep": 3}]},
    "service_tier": "auto",
    "a_field_of_next_year": {"x": [1]},
    "stream": True,
}


async def test_bodies_of_agents_are_answered_with_whatever_they_have_besides(served: Served) -> None:
    async with served.http.post(served.url + "/v1/messages?beta=true", json=AGENT, headers=AGENT_HEADERS) as response:
        content = (await response.read()).decode()
    assert response.status == 200, content
    assert content.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')
    counted = {name: value for name, value in AGENT.items() if name not in ("max_tokens", "stream")}
    code, answer = await served.post("/v1/messages/count_tokens?beta=true", counted, **AGENT_HEADERS)
    start = json.loads(content.split("data: ", 2)[1].split("\n")[0])
    usage = start["message"]["usage"]
    assert (code, answer["input_tokens"]) == (200, usage["input_tokens"] + usage["cache_read_input_tokens"])
