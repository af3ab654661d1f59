"""The ollama package: chat, generate, schemas, tools made from functions, sync and async."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import ollama

MODEL = "fastserve-demo"
client = ollama.Client(host=os.environ["FASTSERVE_URL"])
SETTINGS = {"temperature": 0}


def get_weather(city: str) -> str:
    """Get the weather in a city

    Args:
        city: name of the city
    """
    return f"sunny in {city}"


asked = [{"role": "user", "content": "What is 7 + 5?"}]
whole = client.chat(MODEL, messages=asked, options=SETTINGS)
assert "12" in (whole.message.content or ""), whole
pieces = list(client.chat(MODEL, messages=asked, options=SETTINGS, stream=True))
assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
assert pieces[-1].done
assert pieces[-1].eval_count == whole.eval_count

weather = [{"role": "user", "content": "What is the weather in Paris?"}]
called = client.chat(MODEL, messages=weather, tools=[get_weather], options=SETTINGS).message
(call,) = called.tool_calls or []
assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
turns: list[Any] = [*weather, called, {"role": "tool", "tool_name": "get_weather", "content": get_weather("Paris")}]
assert client.chat(MODEL, messages=turns, tools=[get_weather], options=SETTINGS).message.content

schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
shaped = client.generate(MODEL, prompt="How old?", format=schema, options=SETTINGS)
assert isinstance(json.loads(shaped.response or "")["age"], int)
assert [model.model for model in client.list().models] == [MODEL] or MODEL in str(client.list())
assert client.show(MODEL).capabilities


async def ask() -> str | None:
    return (
        await ollama.AsyncClient(host=os.environ["FASTSERVE_URL"]).chat(MODEL, messages=asked, options=SETTINGS)
    ).message.content


assert asyncio.run(ask()) == whole.message.content
