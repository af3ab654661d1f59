"""The openai package: chats, streams, parse, tools, Responses, files and batches."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import openai
from pydantic import BaseModel

MODEL = "fastserve-demo"
URL = os.environ["FASTSERVE_URL"]
WEATHER = "What is the weather in Paris?"


class Person(BaseModel):
    name: str
    age: int


class get_weather(BaseModel):
    """Get the weather in a city"""

    city: str


def check_parse_and_tools(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Give me a JSON object with name Anna and age 30."}],
        response_format=Person,
        temperature=0,
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    tools: Any = [openai.pydantic_function_tool(get_weather)]
    asked: list[Any] = [{"role": "user", "content": WEATHER}]
    calls = client.chat.completions.parse(model=MODEL, messages=asked, tools=tools, temperature=0)
    (call,) = calls.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == get_weather(city="Paris"), call
    with client.chat.completions.stream(model=MODEL, messages=asked, tools=tools, temperature=0) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert [one.function.arguments for one in streamed] == [call.function.arguments]
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Give me a JSON object with name Anna and age 30."}],
        response_format=Person,
        temperature=0,
    ) as structured:
        assert structured.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed


def check_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="What is 7 + 5?", temperature=0)
    assert "12" in first.output_text, first
    second = client.responses.create(model=MODEL, input="And 7 + 6?", previous_response_id=first.id, temperature=0)
    assert second.previous_response_id == first.id
    assert len(client.responses.input_items.list(second.id).data) == 3
    assert client.responses.retrieve(first.id).output_text == first.output_text
    with client.responses.stream(model=MODEL, input="What is 7 + 5?", temperature=0) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == first.output_text
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    parsed = client.responses.parse(
        model=MODEL, input="Give me a JSON object with name Anna and age 30.", text_format=Person, temperature=0
    )
    assert isinstance(parsed.output_parsed, Person)
    tool: Any = {"type": "function", **openai.pydantic_function_tool(get_weather)["function"]}
    called = client.responses.create(model=MODEL, input=WEATHER, tools=[tool], temperature=0)
    (call,) = called.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    answer = client.responses.create(model=MODEL, input=result, previous_response_id=called.id, temperature=0)
    assert answer.output_text
    running = client.responses.create(model=MODEL, input="What is 7 + 5?", background=True, temperature=0)
    ended = wait_for(lambda: client.responses.retrieve(running.id), "completed")
    assert ended.output_text == first.output_text
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("a deleted response is still there")


def check_batches(client: openai.OpenAI) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "What is 7 + 5?"}], "temperature": 0}
    lines = [
        json.dumps({"custom_id": f"{index}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        for index in range(3)
    ]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"of": "a test"}
    )
    batch = wait_for(lambda: client.batches.retrieve(batch.id), "completed")
    assert batch.output_file_id is not None
    assert batch.id in [one.id for one in client.batches.list()]
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == ["0", "1", "2"]
    assert all("12" in answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers)
    assert client.files.delete(file.id).deleted


async def check_async() -> None:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        asked: list[Any] = [{"role": "user", "content": "What is 7 + 5?"}]
        whole = await client.chat.completions.create(model=MODEL, messages=asked, temperature=0)
        stream = await client.chat.completions.create(
            model=MODEL, messages=asked, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert text == whole.choices[0].message.content
        assert usage is not None
        assert whole.usage is not None
        assert usage.completion_tokens == whole.usage.completion_tokens
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=asked, max_tokens=1)
        assert raw.headers["x-request-id"]
        assert MODEL in [model.id async for model in client.models.list()]


def wait_for(retrieve: Any, status: str) -> Any:
    deadline = time.monotonic() + 60
    while (found := retrieve()).status != status:
        assert found.status in ("queued", "in_progress", "validating", "finalizing"), found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as sdk:
    check_parse_and_tools(sdk)
    check_responses(sdk)
    check_batches(sdk)
asyncio.run(check_async())
