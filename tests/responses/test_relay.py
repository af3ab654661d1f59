"""Workers that fail: before the first event another one answers unseen, after it the stream ends with an event."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.openai.responses.answer import event
from tests.gateway.cluster import Cluster, Script, respond, start_cluster, stream

RESPONSE = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}
DONE = {**RESPONSE, "status": "completed", "output": [{"type": "message", "id": "msg_1", "content": []}]}
BEGIN = (
    event("response.created", 0, {"response": RESPONSE}),
    event("response.in_progress", 1, {"response": RESPONSE}),
    event("response.output_text.delta", 2, {"delta": "Hi"}),
)
END = event("response.completed", 3, {"response": DONE})
BODY = {"model": "demo", "input": "hi", "stream": True}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with start_cluster(responses_store=str(tmp_path / "store")) as made:
        yield made


async def ask(cluster: Cluster) -> tuple[int, bytes]:
    async with cluster.post(BODY, path="/v1/responses") as response:
        return response.status, await response.read()


@pytest.mark.parametrize(
    "script",
    [
        stream(b": keep-alive\n\n", then="reset"),
        stream(b"event: response.created\ndata: {}\n\n"),
        stream(b'data: {"choices":[{"delta":{}}]}\n\n'),
        stream(b'event: error\ndata: {"type":"error","sequence_number":0,"error":{"message":"no","type":"x"}}\n\n'),
        respond(503, {"error": {"message": "full", "type": "x"}}),
    ],
)
async def test_a_failure_before_the_first_event_is_not_seen(cluster: Cluster, script: Script) -> None:
    await cluster.worker(script)
    await cluster.worker(stream(*BEGIN, END))
    status, content = await ask(cluster)
    assert (status, content.removeprefix(b": keep-alive\n\n")) == (200, b"".join([*BEGIN, END]))


@pytest.mark.parametrize("then", ["reset", "end"])
async def test_a_broken_stream_ends_with_a_failed_response(cluster: Cluster, then: str) -> None:
    await cluster.worker(stream(*BEGIN, then=then))
    status, content = await ask(cluster)
    assert status == 200
    assert content.startswith(b"".join(BEGIN))
    name, data = content[len(b"".join(BEGIN)) :].decode().strip().split("\n")
    last: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed"
    assert (last["sequence_number"], last["response"]["status"]) == (3, "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["id"] == RESPONSE["id"]


async def test_without_any_worker_the_error_is_an_answer(cluster: Cluster) -> None:
    await cluster.worker(stream(b": keep-alive\n\n", then="reset"))
    status, content = await ask(cluster)
    if status == 200:  # the keep-alive was sent
        assert b'event: error\ndata: {"type":"error","sequence_number":0' in content
    else:
        assert status == 503


async def test_the_request_is_relayed_as_it_came_with_the_head_of_the_response(cluster: Cluster) -> None:
    worker = await cluster.worker(stream(*BEGIN, END))
    raw = b'{"input" : "hi", "model":"demo","stream":true, "x": 1.50}'
    headers = {"content-type": "application/json", "x-fastserve-response": "forged"}
    async with cluster.http.post(cluster.url + "/v1/responses", data=raw, headers=headers) as response:
        assert response.status == 200
        await response.read()
    (request,) = worker.requests
    assert request[0] == "/v1/responses"
    assert request[2] == raw
    assert request[1]["x-fastserve-response"].startswith("resp_")
