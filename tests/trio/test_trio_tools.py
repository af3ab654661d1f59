"""The demo model calls tools, through the API server and OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from .clients import MODEL
from .processes import Trio

TOOLS: list[Any] = [
    openai.types.chat.ChatCompletionFunctionToolParam(
        type="function",
        function={
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]},
        },
    )
    for name, description, argument in (
        ("get_weather", "Get the weather in a city", "city"),
        ("calculator", "Compute an expression", "expression"),
    )
]
RESULTS = {"get_weather": "sunny, 21 degrees", "calculator": "812"}


def test_a_tool_is_called_and_its_result_is_used(trio: Trio) -> None:
    with openai.OpenAI(base_url=f"{trio.server.address}/v1", api_key="none", max_retries=0) as sdk:
        for question, name, argument in (
            ("What is the weather in Paris?", "get_weather", "Paris"),
            ("What is 764 + 48?", "calculator", "764"),
        ):
            messages: list[Any] = [{"role": "user", "content": question}]
            settings: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "temperature": 0}
            choice = sdk.chat.completions.create(messages=messages, **settings).choices[0]
            assert choice.finish_reason == "tool_calls", choice
            (call,) = choice.message.tool_calls or []
            assert call.type == "function"
            assert call.function.name == name
            assert argument in json.dumps(json.loads(call.function.arguments))
            with sdk.chat.completions.stream(messages=messages, **settings) as stream:
                for _ in stream:
                    pass
                streamed = stream.get_final_completion().choices[0]
            (same,) = streamed.message.tool_calls or []
            assert (same.function.name, same.function.arguments) == (name, call.function.arguments)
            messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": RESULTS[name]}]
            answer = sdk.chat.completions.create(messages=messages, **settings).choices[0]
            assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
            assert (answer.message.content or "").strip()


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
    "additionalProperties": False,
}
WEATHER = TOOLS[0]["function"]
QUESTION = "What is the weather in Paris?"


def is_place(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"city", "sunny"} and isinstance(found["city"], str) and isinstance(found["sunny"], bool)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calculator"}}])
def test_calls_that_must_come_do(trio: Trio, choice: Any) -> None:
    with openai.OpenAI(base_url=f"{trio.server.address}/v1", api_key="none", max_retries=0) as sdk:
        answer = sdk.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello!"}],
            tools=TOOLS,
            tool_choice=choice,
            temperature=0,
        ).choices[0]
    assert answer.message.tool_calls
    for call in answer.message.tool_calls:
        assert call.type == "function"
        argument = {"get_weather": "city", "calculator": "expression"}[call.function.name]
        assert isinstance(json.loads(call.function.arguments)[argument], str)
    if choice != "required":
        assert [call.function.name for call in answer.message.tool_calls if call.type == "function"] == ["calculator"]


def test_a_schema_that_cannot_be_followed_is_named_by_every_api(trio: Trio) -> None:
    bad = {"type": "object", "properties": {"city": {"type": "string", "pattern": "(?=x)"}}}
    function = {**WEATHER, "parameters": bad}
    turns = [{"role": "user", "content": QUESTION}]
    for path, fields, where in (
        (
            "/v1/chat/completions",
            {"messages": turns, "tools": [{"type": "function", "function": function}], "tool_choice": "required"},
            "tools.0.function.parameters.properties.city",
        ),
        (
            "/v1/responses",
            {"input": QUESTION, "tools": [{"type": "function", **function, "strict": True}]},
            "tools.0.parameters.properties.city",
        ),
        (
            "/v1/messages",
            {
                "messages": turns,
                "max_tokens": 50,
                "tools": [{"name": "get_weather", "input_schema": bad}],
                "tool_choice": {"type": "any"},
            },
            "tools.0.input_schema.properties.city",
        ),
        ("/api/chat", {"messages": turns, "format": bad}, "format.properties.city"),
    ):
        answer = httpx.post(trio.server.address + path, json={"model": MODEL, **fields}, timeout=30)
        assert answer.status_code == 400, (path, answer.text)
        assert f"'{where}'" in answer.text, (path, answer.text)


def test_tools_and_schemas_through_the_responses_api(trio: Trio) -> None:
    with openai.OpenAI(base_url=f"{trio.server.address}/v1", api_key="none", max_retries=0) as sdk:
        settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "store": False}
        tools: Any = [{"type": "function", "strict": True, **WEATHER}]
        items: Any = [{"role": "user", "content": QUESTION}]
        first = sdk.responses.create(input=items, tools=tools, **settings)
        (call,) = [item for item in first.output if item.type == "function_call"]
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
        items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": RESULTS["get_weather"]}]
        assert sdk.responses.create(input=items, tools=tools, **settings).output_text.strip()
        form: Any = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}}
        formed = sdk.responses.create(input=QUESTION, text=form, **settings)
        assert is_place(formed.output_text)
        assert formed.usage is not None
        assert formed.usage.output_tokens_details.reasoning_tokens == 0
        assert formed.usage.total_tokens == formed.usage.input_tokens + formed.usage.output_tokens


def test_tools_and_schemas_through_anthropics_api(trio: Trio) -> None:
    with anthropic.Anthropic(base_url=trio.server.address, api_key="none", max_retries=0) as sdk:
        settings: dict[str, Any] = {"model": MODEL, "max_tokens": 200}
        greedy = {"temperature": 0}
        tools: Any = [{"name": "get_weather", "input_schema": WEATHER["parameters"], "strict": True}]
        turns: Any = [{"role": "user", "content": QUESTION}]
        first = sdk.messages.create(messages=turns, tools=tools, extra_body=greedy, **settings)
        (call,) = [block for block in first.content if block.type == "tool_use"]
        assert (first.stop_reason, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULTS["get_weather"]}
        turns += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = sdk.messages.create(messages=turns, tools=tools, extra_body=greedy, **settings)
        assert (second.stop_reason, second.content[0].type) == ("end_turn", "text")
        extra = greedy | {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
        formed = sdk.messages.create(messages=turns[:1], extra_body=extra, **settings).content[0]
        assert formed.type == "text"
        assert is_place(formed.text)


def test_tools_and_schemas_through_ollamas_api(trio: Trio) -> None:
    def ask(messages: list[Any], **fields: Any) -> Any:
        body = {"model": MODEL, "messages": messages, "stream": False, "options": {"temperature": 0}, **fields}
        answer = httpx.post(f"{trio.server.address}/api/chat", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["message"]

    turns: list[Any] = [{"role": "user", "content": QUESTION}]
    message = ask(turns, tools=TOOLS)
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("get_weather", {"city": "Paris"})
    turns += [message, {"role": "tool", "tool_name": "get_weather", "content": RESULTS["get_weather"]}]
    assert ask(turns, tools=TOOLS)["content"].strip()
    assert is_place(ask(turns[:1], format=SCHEMA)["content"])
    both = ask(turns[:1], tools=TOOLS, format=SCHEMA)
    assert both.get("tool_calls") or is_place(both["content"]), "a call or the format"
