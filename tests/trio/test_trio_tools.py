"""The demo model calls tools, through the API server and OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import openai

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
