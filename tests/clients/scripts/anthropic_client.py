"""The anthropic package: whole and streamed, sync and async, tools and the tool runner."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import anthropic

MODEL = "fastserve-demo"
URL = os.environ["FASTSERVE_URL"]
OPTIONS: dict[str, Any] = {"base_url": URL, "api_key": "none", "max_retries": 0}
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
"""The package has no parameter for it."""
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL: Any = {
    "name": "get_weather",
    "description": "Get the weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def check_tools(client: anthropic.Anthropic) -> None:
    settings: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "tools": [TOOL], **GREEDY}
    called = client.messages.create(messages=WEATHER, **settings)
    assert called.stop_reason == "tool_use", called
    call = called.content[-1]
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("get_weather", {"city": "Paris"})
    with client.messages.stream(messages=WEATHER, **settings) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert final.content[-1].model_dump(include={"name", "input"}) == {"name": call.name, "input": call.input}
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny, 21"}]}
    turns: list[Any] = [
        *WEATHER,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(messages=turns, **settings)
    assert answer.stop_reason == "end_turn", answer
    forced = client.messages.create(
        messages=[{"role": "user", "content": "Hi"}], tool_choice={"type": "tool", "name": "get_weather"}, **settings
    )
    assert [block.type for block in forced.content][-1] == "tool_use"
    assert client.messages.count_tokens(model=MODEL, messages=WEATHER, tools=[TOOL]).input_tokens > 50


def check_tool_runner(client: anthropic.Anthropic) -> None:
    cities: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city"""
        cities.append(city)
        return "sunny, 21 degrees"

    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=100, tools=[get_weather], messages=WEATHER, **GREEDY
    )
    last = runner.until_done()
    assert cities == ["Paris"]
    assert last.stop_reason == "end_turn", last


async def check_async() -> None:
    async with anthropic.AsyncAnthropic(**OPTIONS) as client:
        asked: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "What is 7 + 5?"}]}]
        whole = await client.messages.create(model=MODEL, max_tokens=50, messages=asked, **GREEDY)
        assert whole.content[0].type == "text"
        assert "12" in whole.content[0].text
        async with client.messages.stream(model=MODEL, max_tokens=50, messages=asked, **GREEDY) as stream:
            assert await stream.get_final_text() == whole.content[0].text


with anthropic.Anthropic(**OPTIONS) as sdk:
    check_tools(sdk)
    check_tool_runner(sdk)
asyncio.run(check_async())
