"""Requests go to workers whose model can answer them, and a model that cannot is another matter than one that is not
there.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.cluster import CHAT, MODEL, Cluster, answer_well, reply, respond, start_cluster
from tests.gateway.test_gateway_relay import STREAM

COMPLETION = {"model": MODEL, "prompt": "hi"}


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("is_away", [False, True], ids=["controller", "no-controller"])
async def test_a_model_without_the_capability_is_a_400_that_lists_its_capabilities(
    cluster: Cluster, body: dict[str, Any], is_away: bool
) -> None:
    worker = await cluster.worker(answer_well, capabilities=["completions", "embeddings"])
    await cluster.in_table()
    if is_away:
        await cluster.controller.kill()
    async with cluster.post(body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["type"], error["param"], error["code"]) == (
            *(400, "invalid_request_error", "model"),
            "unsupported_capability",
        )
    for words in (
        f"'{MODEL}'",
        "chat (/v1/chat/completions)",
        "completions (/v1/completions)",
        "embeddings",
        "template",
    ):
        assert words in error["message"]
    assert not worker.requests
    async with cluster.post(COMPLETION, path="/v1/completions") as response:
        assert response.status == 200
    assert len(worker.requests) == 1


@pytest.mark.parametrize("is_away", [False, True], ids=["controller", "no-controller"])
async def test_of_workers_with_one_name_those_with_the_capability_are_asked(cluster: Cluster, is_away: bool) -> None:
    plain = await cluster.worker(answer_well, capabilities=["completions"])
    able = await cluster.worker(answer_well, capabilities=["chat"])
    await cluster.in_table()
    if is_away:
        await cluster.controller.kill()
    for _ in range(6):
        async with cluster.post() as response:
            assert response.status == 200
        async with cluster.post(COMPLETION, path="/v1/completions") as response:
            assert response.status == 200
    assert {path for path, _, _ in able.requests} == {"/v1/chat/completions"}
    assert {path for path, _, _ in plain.requests} == {"/v1/completions"}
    assert len(able.requests) == len(plain.requests) == 6


async def test_a_worker_that_states_nothing_gets_chats_and_completions(cluster: Cluster) -> None:
    worker = await cluster.worker(answer_well)
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        async with cluster.post(body, path=path) as response:
            assert response.status == 200
    assert [path for path, _, _ in worker.requests] == ["/v1/chat/completions", "/v1/completions"]


async def test_a_capability_whose_worker_has_just_gone_is_awaited_and_not_denied(cluster: Cluster) -> None:
    able = await cluster.worker(answer_well, capabilities=["chat", "completions"])
    await cluster.worker(answer_well, capabilities=["completions"])
    await cluster.in_table()
    await able.kill()
    del cluster.controller.workers[able.address]  # as after a restart of the controller
    async with cluster.post() as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "no_worker")
        assert int(response.headers["retry-after"]) >= 1


async def test_workers_without_the_capability_are_not_tried_when_the_last_with_it_fails(cluster: Cluster) -> None:
    able = await cluster.worker(respond(500, {"error": {"message": "no", "type": "x"}}), capabilities=["chat"])
    other = await cluster.worker(answer_well, capabilities=["completions"])
    async with cluster.post() as response:
        assert response.status in (500, 503)
    assert len(able.requests) == 1
    assert not other.requests


async def test_names_of_strangers_are_printable_and_short_in_the_refusal() -> None:
    name = "x" * 300 + "\x1b[2J"
    async with start_cluster() as cluster:
        await cluster.worker(reply(b"{}"), "x" * 300, capabilities=["completions"])
        for model in ("x" * 300, name):
            async with cluster.post({**CHAT, "model": model}) as response:
                assert response.status in (400, 404)
                message = (await response.json())["error"]["message"]
            assert len(message) < 500
            assert message.isprintable()
