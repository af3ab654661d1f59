"""A model without workers for the moment is distinguished from one that does not exist."""

from __future__ import annotations

import asyncio
import time

import pytest

from fastserve import errors
from fastserve.errors import FastserveError
from fastserve.gateway import dispatch
from fastserve.gateway.known_models import MAX_NAMES, REMEMBERED_S, KnownModels
from tests.gateway.cluster import CHAT, MODEL, Cluster, answer_well, start_cluster
from tests.gateway.test_gateway_relay import STREAM


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def test_names_are_remembered_for_a_time_and_a_number() -> None:
    clock = Clock()
    known = KnownModels(clock)
    known.note({"old": ["chat"]})
    clock.now += REMEMBERED_S / 2
    known.note({"new": ["chat"]})
    clock.now += REMEMBERED_S / 2
    assert known.contains("new")
    assert not known.contains("old")
    known.note({f"model-{number}": ["chat"] for number in range(MAX_NAMES)})
    assert not known.contains("new")
    assert known.contains("model-0")


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_a_model_whose_workers_are_gone_is_503_and_not_404(cluster: Cluster, body: dict[str, object]) -> None:
    worker = await cluster.worker(answer_well)
    await cluster.in_table()
    await worker.kill()
    cluster.controller.workers.clear()
    for seconds in (None, 17.0):
        cluster.controller.retry_after_s = seconds
        cluster.controller.remembered = {MODEL} if seconds else set()
        async with cluster.post(body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) in ((503, "no_worker"), (503, "worker_lost"))
            assert int(response.headers["retry-after"]) >= 1
    async with cluster.post(body) as response:
        if (await response.json())["error"]["code"] == "no_worker":
            assert response.headers["retry-after"] == "17"


async def test_the_controllers_retry_after_is_passed_on(cluster: Cluster) -> None:
    cluster.controller.remembered = {"loading"}
    cluster.controller.retry_after_s = 16.2
    async with cluster.post({**CHAT, "model": "loading"}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "no_worker")
        assert response.headers["retry-after"] == "17"


async def test_a_model_that_left_is_503_in_the_list_of_models_too(cluster: Cluster) -> None:
    worker = await cluster.worker(answer_well)
    await cluster.worker(answer_well, "other")
    await cluster.in_table()
    cluster.controller.workers.pop(worker.address)
    async with cluster.http.get(f"{cluster.url}/v1/models/{MODEL}") as response:
        assert response.status == 503
        assert int(response.headers["retry-after"]) >= 1
    async with cluster.http.get(f"{cluster.url}/v1/models/nobody") as response:
        assert response.status == 404


@pytest.mark.parametrize("name", ["nobody", "x" * 100_000, "é" * 600, "a\nFATAL: all is lost\x1b[2J\u202e"])
async def test_an_unknown_model_is_404_at_once_and_named_once_and_shortly(cluster: Cluster, name: str) -> None:
    await cluster.worker(answer_well)
    await cluster.in_table()
    begin = time.monotonic()
    async with cluster.post({**CHAT, "model": name}) as response:
        assert response.status == 404
        text = await response.text()
        body = await response.json()
    assert time.monotonic() - begin < 2.0
    assert body["error"]["code"] == "model_not_found"
    assert len(body["error"]["message"]) < 300
    assert len(text) < 2000
    assert name[:60] in body["error"]["message"] or not name.isprintable()
    assert body["error"]["message"].isprintable()
    # It did not count as a failure of the controller.
    async with cluster.post() as response:
        assert response.status == 200


def test_every_429_503_and_504_has_a_retry_after() -> None:
    def subclasses(kind: type[FastserveError]) -> list[type[FastserveError]]:
        return [kind, *(each for child in kind.__subclasses__() for each in subclasses(child))]

    asked_to_wait = [kind for kind in subclasses(FastserveError) if kind.status in (429, 503, 504)]
    assert {errors.OverloadedError, errors.NoWorkerError, errors.WorkerTimeoutError} <= set(asked_to_wait)
    for kind in asked_to_wait:
        assert int(kind("a sentence").headers()["Retry-After"]) >= 1, kind


async def test_ready_asks_for_the_table_when_it_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_INTERVAL_S", 60.0)
    async with start_cluster() as cluster:
        for _ in range(20):
            async with cluster.http.get(cluster.url + "/ready") as response:
                assert response.status == 503
                assert int(response.headers["retry-after"]) >= 1
        polls_in_vain = cluster.controller.polls
        await cluster.worker(answer_well)

        for _ in range(500):
            async with cluster.http.head(cluster.url + "/ready") as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.01)
        assert response.status == 200
        # Each request refreshes the table once at most, and concurrent requests share a refresh.
        assert polls_in_vain < 20
        async with cluster.http.head(cluster.url + "/health") as response:
            assert response.status == 200
            assert await response.read() == b""
