"""openai-agents: chat completions and Responses, tools, output types, streams, sessions."""

from __future__ import annotations

import asyncio
import os

import agents
import openai
from pydantic import BaseModel

agents.set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{os.environ['FASTSERVE_URL']}/v1", api_key="none", max_retries=0)
SETTINGS = agents.ModelSettings(temperature=0, max_tokens=200)
cities: list[str] = []


class Person(BaseModel):
    name: str
    age: int


@agents.function_tool
def get_weather(city: str) -> str:
    """Get the weather in a city"""
    cities.append(city)
    return "sunny, 21 degrees"


async def check(model: agents.Model) -> None:
    plain = agents.Agent(name="plain", model=model, model_settings=SETTINGS)
    whole = await agents.Runner.run(plain, "What is 7 + 5?")
    assert "12" in whole.final_output, whole
    streamed = agents.Runner.run_streamed(plain, "What is 7 + 5?")
    kinds = [event.type async for event in streamed.stream_events()]
    assert streamed.final_output == whole.final_output
    assert "raw_response_event" in kinds

    cities.clear()
    with_tool = agents.Agent(name="weather", model=model, model_settings=SETTINGS, tools=[get_weather])
    assert (await agents.Runner.run(with_tool, "What is the weather in Paris?")).final_output
    again = agents.Runner.run_streamed(with_tool, "What is the weather in Paris?")
    async for _ in again.stream_events():
        pass
    assert again.final_output
    assert cities == ["Paris", "Paris"], cities

    shaped = agents.Agent(name="shaped", model=model, model_settings=SETTINGS, output_type=Person)
    assert isinstance(
        (await agents.Runner.run(shaped, "Give me a JSON object with name Anna and age 30.")).final_output, Person
    )

    session = agents.SQLiteSession("a session")
    for question in ("What is 7 + 5?", "And 7 + 6?"):
        assert (await agents.Runner.run(plain, question, session=session)).final_output
    assert len(await session.get_items()) == 4


async def check_all() -> None:
    await check(agents.OpenAIChatCompletionsModel(model="fastserve-demo", openai_client=client))
    await check(agents.OpenAIResponsesModel(model="fastserve-demo", openai_client=client))


asyncio.run(check_all())
