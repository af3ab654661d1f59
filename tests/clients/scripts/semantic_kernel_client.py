"""semantic-kernel: chat, stream, automatic function calls, structured answers."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import openai
from pydantic import BaseModel
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory
from semantic_kernel.functions import kernel_function

cities: list[str] = []


class Person(BaseModel):
    name: str
    age: int


class Weather:
    @kernel_function(description="Get the weather in a city")
    def get_weather(self, city: Annotated[str, "name of the city"]) -> str:
        cities.append(city)
        return "sunny, 21 degrees"


async def check() -> None:
    client = openai.AsyncOpenAI(base_url=f"{os.environ['FASTSERVE_URL']}/v1", api_key="none", max_retries=0)
    chat = OpenAIChatCompletion(ai_model_id="fastserve-demo", async_client=client)
    kernel = Kernel()
    kernel.add_service(chat)
    kernel.add_plugin(Weather(), "weather")

    def asking(text: str) -> ChatHistory:
        history = ChatHistory()
        history.add_user_message(text)
        return history

    plain = OpenAIChatPromptExecutionSettings(temperature=0)
    whole = await chat.get_chat_message_content(asking("What is 7 + 5?"), plain)
    assert "12" in str(whole), whole
    pieces = [str(piece) async for piece in chat.get_streaming_chat_message_content(asking("What is 7 + 5?"), plain)]
    assert "".join(pieces) == str(whole)

    # It calls "weather-get_weather", a name that the demo model would not choose by itself.
    calling = OpenAIChatPromptExecutionSettings(
        temperature=0, max_tokens=200, function_choice_behavior=FunctionChoiceBehavior.Required()
    )
    answer = await chat.get_chat_message_content(asking("What is the weather in Paris?"), calling, kernel=kernel)
    assert str(answer), answer
    assert cities == ["Paris"], cities

    shaped = OpenAIChatPromptExecutionSettings(temperature=0, max_tokens=200, response_format=Person)
    made = await chat.get_chat_message_content(asking("Give me a JSON object with name Anna and age 30."), shaped)
    Person.model_validate_json(str(made))


asyncio.run(check())
