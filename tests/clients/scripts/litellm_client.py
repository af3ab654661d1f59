"""litellm: its routes openai/, hosted_vllm/, text-completion-openai/, anthropic/ and ollama_chat/."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import litellm

URL = os.environ["FASTSERVE_URL"]
ASKED = [{"role": "user", "content": "What is 7 + 5?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
BASES = {
    "openai/fastserve-demo": f"{URL}/v1",
    "hosted_vllm/fastserve-demo": f"{URL}/v1",
    "anthropic/fastserve-demo": URL,
    "ollama_chat/fastserve-demo": URL,
}
litellm.telemetry = False
litellm.num_retries = 0


async def ask_async(settings: dict[str, Any]) -> str:
    answer = await litellm.acompletion(messages=ASKED, **settings)
    return str(answer.choices[0].message.content)


for model, base in BASES.items():
    settings: dict[str, Any] = {"model": model, "api_base": base, "api_key": "none", "temperature": 0, "timeout": 60}
    whole = litellm.completion(messages=ASKED, **settings).choices[0]
    assert "12" in whole.message.content, (model, whole)
    pieces = list(litellm.completion(messages=ASKED, stream=True, **settings))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content, model
    called = litellm.completion(messages=WEATHER, tools=[TOOL], **settings).choices[0]
    assert called.finish_reason == "tool_calls", (model, called)
    (call,) = called.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}, (model, call)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
    after = litellm.completion(messages=[*WEATHER, called.message, result], tools=[TOOL], **settings).choices[0]
    assert after.message.content, (model, after)
    assert asyncio.run(ask_async(settings)) == whole.message.content, model

response = litellm.responses(
    model="openai/fastserve-demo", input="What is 7 + 5?", api_base=f"{URL}/v1", api_key="none", temperature=0
)
assert "12" in response.output[-1].content[0].text
text = litellm.text_completion(
    model="text-completion-openai/fastserve-demo", prompt="Once", api_base=f"{URL}/v1", api_key="none", max_tokens=5
)
assert text.choices[0].text
