"""Ollama's API through the API server, with Ollama's own Python client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import ollama
import pytest

from fastserve.engine.fake import Script
from tests.dialects.conftest import Serve, Served
from tests.worker.conftest import MODEL

TURN = {"role": "user", "content": "hi"}
TEXT = "hello there, 世界"

DOCS = Path(__file__).parents[2] / "docs" / "ollama.md"


@pytest.fixture
async def served(serve: Serve, say: Callable[[str], Script]) -> AsyncIterator[Served]:
    async with serve(say(TEXT)) as made:
        yield made


async def test_chats_of_ollamas_client_are_the_same_streamed_and_whole(served: Served) -> None:
    client = ollama.AsyncClient(host=served.url)
    for name in (MODEL, f"{MODEL}:latest"):
        whole = await client.chat(model=name, messages=[TURN])
        assert (whole.message.content, whole.done, whole.done_reason, whole.model) == (TEXT, True, "stop", name)
        assert None not in (whole.eval_count, whole.prompt_eval_count, whole.total_duration)
        chunks = [chunk async for chunk in await client.chat(model=name, messages=[TURN], stream=True)]
        assert "".join(chunk.message.content or "" for chunk in chunks) == TEXT
        assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        last = chunks[-1]
        assert (last.done_reason, last.prompt_eval_count) == ("stop", whole.prompt_eval_count)
        assert last.eval_count == whole.eval_count
    short = await client.chat(model=MODEL, messages=[TURN], options={"num_predict": 1, "num_ctx": 4096, "novel": 1})
    assert (short.done_reason, short.eval_count) == ("length", 1)
    stopped = await client.chat(model=MODEL, messages=[TURN], options={"stop": ["there"], "repeat_penalty": 1.1})
    assert stopped.message.content == "hello "
    scored = await client.chat(model=MODEL, messages=[TURN], logprobs=True, top_logprobs=2)
    entries = scored.logprobs or []
    assert "".join(entry.token for entry in entries).startswith("hello there, ")
    assert {len(entry.top_logprobs or ()) for entry in entries} == {2}


async def test_generate_renders_the_template_unless_the_prompt_is_raw(served: Served) -> None:
    client = ollama.AsyncClient(host=served.url)
    answer = await client.generate(model=MODEL, prompt="hi", system="be kind")
    chat = await client.chat(model=MODEL, messages=[{"role": "system", "content": "be kind"}, TURN])
    assert (answer.response, answer.prompt_eval_count) == (TEXT, chat.prompt_eval_count)
    raw = await client.generate(model=MODEL, prompt="hi", raw=True)
    assert raw.response == TEXT
    assert (raw.prompt_eval_count or 0) < (answer.prompt_eval_count or 0)
    chunks = [chunk.response async for chunk in await client.generate(model=MODEL, prompt="hi", raw=True, stream=True)]
    assert "".join(chunk or "" for chunk in chunks) == TEXT


async def test_the_example_of_the_docs_runs(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    example = DOCS.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    code = example.replace("http://localhost:8888", served.url)
    await asyncio.to_thread(exec, code, {})
    assert capsys.readouterr().out.strip() == "hello there, 世界"


async def test_the_synchronous_client_streams_too(served: Served) -> None:
    client = ollama.Client(host=served.url)
    chunks = await asyncio.to_thread(lambda: list(client.chat(model=MODEL, messages=[TURN], stream=True)))
    assert "".join(chunk.message.content or "" for chunk in chunks) == TEXT


async def test_models_are_listed_and_described(served: Served) -> None:
    client = ollama.AsyncClient(host=served.url)
    (listed,) = (await client.list()).models
    (running,) = (await client.ps()).models
    assert (listed.model, running.model) == (MODEL, MODEL)
    shown = await client.show(f"{MODEL}:latest")
    assert shown.modelinfo is not None
    family = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{family}.context_length"] == 2048
    assert "completion" in (shown.capabilities or [])
    async with served.http.get(served.url + "/api/version") as response:
        assert int((await response.json())["version"].split(".")[1]) >= 6
    for method in ("GET", "HEAD"):
        async with served.http.request(method, served.url + "/") as response:
            assert (response.status, await response.text()) == (200, "Ollama is running" if method == "GET" else "")


async def test_an_empty_request_loads_and_unloads_without_effect(served: Served) -> None:
    client = ollama.AsyncClient(host=served.url)
    assert (await client.generate(model=MODEL)).done_reason == "load"
    assert (await client.generate(model=MODEL, keep_alive=0)).done_reason == "unload"
    assert (await client.chat(model=MODEL, keep_alive="5m")).done_reason == "load"
    neutral: list[dict[str, Any]] = [
        {},
        {"messages": []},
        {"messages": None, "tools": None, "format": None, "options": None},
    ]
    for fields in neutral:
        async with served.http.post(served.url + "/api/chat", json={"model": MODEL} | fields) as response:
            line = json.loads(await response.text())
            assert response.content_type == "application/x-ndjson"
        assert (line["done"], line["message"]) == (True, {"role": "assistant", "content": ""})
    assert not served.worker.engine.requests


CHAT = {"model": MODEL, "messages": [TURN]}
GENERATE = {"model": MODEL, "prompt": "hi"}
IMAGE = [{"role": "user", "content": "x", "images": ["aGk="]}]
REFUSALS: list[tuple[str, dict[str, Any], int, str]] = [
    ("chat", CHAT | {"model": "none-such"}, 404, "none-such"),
    ("chat", {"messages": [TURN]}, 400, "'model'"),
    ("chat", CHAT | {"model": 5}, 400, "'model'"),
    ("chat", CHAT | {"stream": "yes"}, 400, "'stream'"),
    ("chat", CHAT | {"messages": "hi"}, 400, "'messages'"),
    ("chat", CHAT | {"messages": [{"role": "robot"}]}, 400, "'messages.0.role'"),
    ("chat", CHAT | {"messages": [{"role": "user", "content": 5}]}, 400, "'messages.0.content'"),
    ("chat", CHAT | {"messages": IMAGE}, 400, "'messages.0.images'"),
    ("chat", CHAT | {"messages": [{"role": "tool", "content": "5"}]}, 400, "'messages.0'"),
    ("chat", CHAT | {"options": [1]}, 400, "'options'"),
    ("chat", CHAT | {"options": {"temperature": "hot"}}, 400, "'options.temperature'"),
    ("chat", CHAT | {"options": {"num_predict": 1.5}}, 400, "'options.num_predict'"),
    ("chat", CHAT | {"options": {"mirostat": 2}}, 400, "'options.mirostat'"),
    ("chat", CHAT | {"options": {"repeat_penalty": -1}}, 400, "'options.repeat_penalty'"),
    ("chat", CHAT | {"think": "a lot"}, 400, "'think'"),
    ("chat", CHAT | {"format": "xml"}, 400, "'format'"),
    ("chat", CHAT | {"keep_alive": {}}, 400, "'keep_alive"),
    ("chat", CHAT | {"top_logprobs": 21, "logprobs": True}, 400, "'top_logprobs'"),
    ("generate", GENERATE | {"suffix": "x"}, 400, "'suffix'"),
    ("generate", GENERATE | {"template": "{{ .Prompt }}"}, 400, "'template'"),
    ("generate", GENERATE | {"images": ["aGk="]}, 400, "'images'"),
    ("generate", GENERATE | {"context": [1, 2]}, 400, "'context'"),
    ("generate", GENERATE | {"raw": True, "system": "x"}, 400, "'system'"),
    ("generate", GENERATE | {"prompt": ["x"]}, 400, "'prompt'"),
    ("show", {}, 400, "'model'"),
    ("show", {"model": "none-such"}, 404, "none-such"),
    ("pull", {"model": "x"}, 400, "--model-path"),
    ("create", {"model": "x"}, 400, "--model-path"),
    ("copy", {"source": "x", "destination": "y"}, 400, "--model-names"),
    ("zap", {}, 404, "There is no route"),
]
"""Route, body, status, and what the message names."""


async def test_refusals_have_ollamas_shape_and_name_the_field(served: Served) -> None:
    for route, body, status, named in REFUSALS:
        code, answer = await served.post(f"/api/{route}", body)
        assert (code, isinstance(answer["error"], str)) == (status, True), (body, answer)
        assert named in answer["error"], (body, answer)
    async with served.http.delete(served.url + "/api/delete", json={"model": MODEL}) as response:
        assert (response.status, "worker" in (await response.json())["error"]) == (400, True)
    with pytest.raises(ollama.ResponseError) as refused:
        await ollama.AsyncClient(host=served.url).chat(model="none-such", messages=[TURN])
    assert (refused.value.status_code, "none-such" in refused.value.error) == (404, True)


async def test_a_lost_worker_ends_the_stream_with_an_error_line(serve: Serve) -> None:
    async with serve(lambda request, info: [300] * 500, token_s=0.02) as served:
        client = ollama.AsyncClient(host=served.url)
        stream = await client.chat(model=MODEL, messages=[TURN], stream=True, options={"num_predict": 200})
        await anext(stream)
        served.worker.engine.die()
        with pytest.raises(ollama.ResponseError):
            [chunk async for chunk in stream]
        await served.worker.worker.deregister()
        code, answer = await served.post("/api/chat", CHAT)
        assert (code, answer["code"], isinstance(answer["error"], str)) == (503, "no_worker", True)


async def test_a_waiting_stream_is_kept_alive_by_spaces(serve: Serve, say: Callable[[str], Script]) -> None:
    late = serve(say("late"), first_token_s=1.6)
    async with late as served, served.http.post(served.url + "/api/chat", json=CHAT) as response:
        content = await response.read()
    lines = content.decode().splitlines()
    assert lines[0].startswith(" ")
    assert "".join(json.loads(line)["message"]["content"] for line in lines) == "late"
