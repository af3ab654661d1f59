"""Each field of each POST route with each wrong value, through the API server: an answer, or an error that names it."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import BaseModel

from fastserve.gateway.stored.routes import ConversationRequest
from fastserve.openai.adapters import LoadAdapterBody, UnloadAdapterBody
from fastserve.openai.batches import BatchRequest
from fastserve.openai.routes import RELAYED_ROUTES, ModelRoute
from tests.gateway.whole_cluster import MODELS, WholeCluster, run_whole_cluster

ANSWER_TIMEOUT_S = 20.0
NUM_AT_ONCE = 8
STATUSES = (200, 400, 403, 404, 413)
"""403: a priority that the key may not set."""
NAMED_BY_OTHERS = ("context_length_exceeded", "adapter_error")
"""Codes and types of errors that name another field, which the value has made wrong, or a worker."""
PLACE = '"@"'
"""Stands for the value in the JSON of a body."""
WRONG_VALUES = {
    "null": "null",
    "true": "true",
    "number": "-7",
    "fraction": "1.5",
    "NaN": "NaN",
    "huge number": "1" + "0" * 400,
    "too large for a float": "1e400",
    "empty": '""',
    "word": '"half a word"',
    "half of a pair": '"\\ud800"',
    "control": '"\\u0000\\u001b[31m"',
    "huge string": json.dumps("x" * 100_000),
    "array": "[]",
    "array of nulls": "[null, null]",
    "object": "{}",
    "deep": "[" * 500 + "]" * 500,
    "deep objects": '{"a":' * 500 + "1" + "}" * 500,
}
NO_JSON = {"NaN", "half of a pair"}
"""Wrong in any field, also in those without effect."""
NAMES_NO_FIELD = {"deep", "deep objects"}
"""Counted before a body is split into its fields."""
USER = {"role": "user", "content": "hi"}
FUNCTION = {"type": "object", "properties": {"a": {"type": "string"}}}
CALLED = {"name": "f", "arguments": "{}"}
TEXT = {"type": "text", "text": "hi"}
BODIES: dict[str, dict[str, Any]] = {
    "ChatRequest": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALLED}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ],
        "max_tokens": 2,
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": FUNCTION}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "text"},
        "logit_bias": {"5": 1},
        "stop": ["a"],
    },
    "CompletionRequest": {"prompt": ["hi", "ho"], "max_tokens": 2, "logit_bias": {"5": 1}, "stop_token_ids": [1]},
    "ResponsesRequest": {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "1", **CALLED},
            {"type": "function_call_output", "call_id": "1", "output": "2"},
        ],
        "max_output_tokens": 16,
        "tools": [{"type": "function", "name": "f", "parameters": FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
    },
    "EmbeddingRequest": {"input": "hi"},
    "RerankRequest": {"query": "a", "documents": ["b", "a"]},
    "ScoreRequest": {"text_1": "a", "text_2": ["b"]},
    "ClassifyRequest": {"input": "hi"},
    "PoolRequest": {"input": "hi"},
    "TokenizeRequest": {"prompt": "hi"},
    "DetokenizeRequest": {"tokens": [1, 2]},
    "TokenCheckRequest": {"prompts": [{"model": MODELS["chat"], "prompt": "hi", "max_tokens": 2}]},
    "GenerateRequest": {"inputs": "hi", "parameters": {"max_new_tokens": 2, "temperature": 1.0, "top_p": 0.5}},
    "MessagesRequest": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": "b"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [TEXT]}]},
        ],
        "max_tokens": 2,
        "system": [{"type": "text", "text": "be short"}],
        "tools": [{"name": "f", "description": "d", "input_schema": FUNCTION}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "metadata": {"user_id": "a"},
    },
    "CountTokensRequest": {"messages": [USER], "system": "be short"},
    "OllamaChatRequest": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}]},
            {"role": "tool", "tool_name": "f", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": FUNCTION}}],
        "options": {"num_predict": 2, "temperature": 1, "stop": ["a"], "seed": 1},
    },
    "OllamaGenerateRequest": {"prompt": "hi", "options": {"num_predict": 2}},
    "OllamaShowRequest": {},
    "ConversationRequest": {"items": [{"type": "message", **USER}], "metadata": {"a": "b"}},
    "BatchRequest": {"input_file_id": "file-1", "endpoint": "/v1/completions", "metadata": {"a": "b"}},
    "LoadAdapterBody": {"lora_name": "a", "lora_path": "/nowhere", "base_model_name": MODELS["chat"]},
    "UnloadAdapterBody": {"lora_name": "a", "base_model_name": MODELS["chat"]},
}
"""Valid bodies by the name of their schema."""


@dataclass(frozen=True)
class Target:
    path: str
    schema: type[BaseModel]
    body: dict[str, Any]

    def places(self) -> Iterator[tuple[str, str]]:
        """The path of each field, declared or in the valid body, and the JSON of a body with PLACE in it."""
        for name in dict.fromkeys([*self.schema.model_fields, *self.body, "never_heard_of"]):
            yield name, json.dumps(self.body | {name: "@"})
        yield from places_in(self.body, self.body, "")


def places_in(body: dict[str, Any], part: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """The same for fields inside of fields; afterwards the body is as before."""
    for key in list(part) if isinstance(part, dict) else range(len(part)):
        place, inner = f"{prefix}{key}", part[key]
        if prefix:
            part[key] = "@"
            yield place, json.dumps(body)
            part[key] = inner
        if isinstance(inner, dict | list):
            yield from places_in(body, inner, f"{place}.")


def target_of(route: ModelRoute) -> Target:
    model = MODELS[route.capability]
    named = {} if route.names_model or "TokenCheck" in route.request.__name__ else {"model": model}
    body = named | copy.deepcopy(BODIES[route.request.__name__])
    return Target(route.path.replace("{model:path}", model), route.request, body)


RELAYED = [target_of(route) for route in RELAYED_ROUTES]
FIRST_OF_SCHEMA = list({target.schema: target for target in reversed(RELAYED)}.values())
OWN = [
    Target("/v1/conversations", ConversationRequest, BODIES["ConversationRequest"]),
    Target("/v1/conversations/CONVERSATION", ConversationRequest, BODIES["ConversationRequest"]),
    Target("/v1/conversations/CONVERSATION/items", ConversationRequest, BODIES["ConversationRequest"]),
    Target("/v1/batches", BatchRequest, BODIES["BatchRequest"]),
    Target("/v1/load_lora_adapter", LoadAdapterBody, BODIES["LoadAdapterBody"]),
    Target("/v1/unload_lora_adapter", UnloadAdapterBody, BODIES["UnloadAdapterBody"]),
]


async def conversation_of(cluster: WholeCluster) -> str:
    async with cluster.http.post(cluster.url + "/v1/conversations", json={}) as response:
        return str((await response.json())["id"])


async def problem_of(cluster: WholeCluster, target: Target, place: str, kind: str, text: str) -> str | None:
    """What is wrong with the answer to a body, if anything."""
    body = text.replace(PLACE, WRONG_VALUES[kind])
    about = f"{target.path} {place}={kind}"
    headers = {"content-type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    try:
        async with cluster.http.post(
            cluster.url + target.path, data=body.encode(), headers=headers, timeout=timeout
        ) as response:
            answer = (await response.read()).decode()
    except TimeoutError:
        return f"{about}: no answer in time"
    status = response.status
    if status not in STATUSES or "internal_error" in answer:
        return f"{about}: {status} {answer[:300]}"
    if status == 200:
        return f"{about}: accepted" if kind in NO_JSON else None
    error = json.loads(answer)["error"]
    named = error if isinstance(error, str) else f"{error['param']} {error['message']}"
    names_other = status != 400 or kind in NAMES_NO_FIELD or any(words in answer for words in NAMED_BY_OTHERS)
    words = [place.partition(".")[0], place.rpartition(".")[2]]
    if "model" not in target.schema.model_fields and "model" not in target.body:
        words.append("'model'")  # which stands in the field that is wrong
    if not names_other and not any(word in named for word in words):
        return f"{about}: {status} names no field: {answer[:300]}"
    return None


async def check(folder: Path, relayed: Sequence[Target], num_kinds: int) -> None:
    """Give each field of these routes and of OWN `num_kinds` of the wrong values: all, or some in turn."""
    kinds = list(WRONG_VALUES)
    problems: list[str] = []
    async with run_whole_cluster(folder) as cluster:
        conversation = await conversation_of(cluster)
        for target in relayed:
            async with cluster.http.post(cluster.url + target.path, json=target.body) as response:
                assert response.status == 200, (target, await response.text())  # else nothing is shown below

        def jobs() -> Iterator[tuple[Target, str, str, str]]:
            number = 0
            for target in [*relayed, *OWN]:
                path = target.path.replace("CONVERSATION", conversation)
                known = Target(path, target.schema, target.body)
                for place, text in known.places():
                    for _ in range(num_kinds):
                        yield known, place, kinds[number % len(kinds)], text
                        number += 1

        left = jobs()

        async def work() -> None:
            for job in left:
                problem = await problem_of(cluster, *job)
                if problem is not None:
                    problems.append(problem)

        await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))
        async with cluster.http.get(cluster.url + "/ready") as response:
            assert response.status == 200
    assert problems == []


async def test_wrong_values_in_fields_of_every_schema(tmp_path: Path) -> None:
    await check(tmp_path, FIRST_OF_SCHEMA, num_kinds=1)


@pytest.mark.slow
async def test_every_wrong_value_in_every_field_of_every_route(tmp_path: Path) -> None:
    await check(tmp_path, RELAYED, num_kinds=len(WRONG_VALUES))
