"""llama-index: OpenAILike complete, chat, streams, tools, structured answers."""

from __future__ import annotations

import asyncio
import os

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

llm = OpenAILike(
    model="fastserve-demo",
    api_base=f"{os.environ['FASTSERVE_URL']}/v1",
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    temperature=0,
    max_retries=0,
)
asked = [ChatMessage(role="user", content="What is 7 + 5?")]
whole = llm.chat(asked).message.content
assert "12" in whole, whole
assert "".join(piece.delta for piece in llm.stream_chat(asked)) == whole
assert "12" in llm.complete("What is 7 + 5?").text
assert asyncio.run(llm.achat(asked)).message.content == whole


def get_weather(city: str) -> str:
    """Get the weather in a city"""
    return f"sunny in {city}"


tool = FunctionTool.from_defaults(get_weather)
called = llm.chat_with_tools([tool], user_msg="What is the weather in Paris?")
(call,) = llm.get_tool_calls_from_response(called)
assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})
*_, last = llm.stream_chat_with_tools([tool], user_msg="What is the weather in Paris?")
assert [one.tool_kwargs for one in llm.get_tool_calls_from_response(last)] == [call.tool_kwargs]
answer = llm.predict_and_call([tool], user_msg="What is the weather in Paris?")
assert "sunny" in str(answer), answer

completions = OpenAILike(
    model="fastserve-demo",
    api_base=f"{os.environ['FASTSERVE_URL']}/v1",
    api_key="none",
    is_chat_model=False,
    temperature=0,
)
assert isinstance(completions.complete("Once", max_tokens=5).text, str)
assert "".join(piece.delta or "" for piece in completions.stream_complete("Once", max_tokens=5))


class Person(BaseModel):
    """A person"""

    name: str
    age: int


assert isinstance(
    llm.structured_predict(Person, PromptTemplate("Give me a JSON object with name Anna and age 30.")), Person
)
