"""pydantic-ai: chats and Responses, output types by tool and by schema, tools, streams."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    """A person"""

    name: str
    age: int


provider = OpenAIProvider(base_url=f"{os.environ['FASTSERVE_URL']}/v1", api_key="none")


def check(kind: type[Any]) -> None:
    model = kind("fastserve-demo", provider=provider)
    settings = {"temperature": 0.0, "max_tokens": 200}
    agent = Agent(model, model_settings=settings)
    first = agent.run_sync("What is 7 + 5?")
    assert "12" in first.output, (kind, first.output)
    assert first.usage.output_tokens > 0
    assert agent.run_sync("And 7 + 6?", message_history=first.all_messages()).output

    cities: list[str] = []
    with_tool = Agent(model, model_settings=settings)

    @with_tool.tool_plain
    def get_weather(city: str) -> str:
        """Get the weather in a city"""
        cities.append(city)
        return "sunny, 21 degrees"

    assert with_tool.run_sync("What is the weather in Paris?").output
    assert cities == ["Paris"], (kind, cities)

    for output in (Person, ToolOutput(Person), NativeOutput(Person)):
        shaped = Agent(model, output_type=output, model_settings=settings)
        made = shaped.run_sync("Give me a JSON object with name Anna and age 30.").output
        assert isinstance(made, Person), (kind, output, made)

    stream = agent.run_stream_sync("What is 7 + 5?")
    assert list(stream.stream_text())[-1] == first.output, kind


for api in (OpenAIChatModel, OpenAIResponsesModel):
    check(api)
