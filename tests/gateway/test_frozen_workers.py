"""A frozen worker keeps its connections open; its requests are retried once its heartbeats have stopped."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fastserve.gateway import dispatch
from tests.gateway.cluster import CHAT, DONE, EVENTS, Cluster, StubWorker, answer_well, hang, stream, until
from tests.gateway.test_gateway_relay import STREAM, WHOLE, ask, error_event

BOTH = pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
LEAVE_S = 4.0


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_INTERVAL_S", 0.1)
    monkeypatch.setattr(dispatch, "PROBE_TIMEOUT", aiohttp.ClientTimeout(total=0.3))


class FrozenWorker(StubWorker):
    """Accept connections, as the kernel does for a stopped process, and answer nothing from now on."""

    is_frozen = False

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.is_frozen:
            await asyncio.sleep(60)
        return await super()._handle(request)


async def add_worker(cluster: Cluster, script: Any) -> FrozenWorker:
    worker = FrozenWorker(script)
    await worker.start()
    cluster.stack.push_async_callback(worker.kill)
    cluster.controller.add(worker.address)
    cluster.workers.append(worker)
    return worker


async def freeze(cluster: Cluster, worker: FrozenWorker) -> None:
    """Freeze the worker, and let the controller drop it for missing heartbeats."""
    await until(lambda: worker.running)
    await cluster.in_table()
    worker.is_frozen = True
    cluster.controller.workers.pop(worker.address)


@BOTH
async def test_a_request_leaves_a_frozen_worker_for_another(cluster: Cluster, body: Any) -> None:
    worker = await add_worker(cluster, hang)
    request = asyncio.ensure_future(ask(cluster, body))
    await freeze(cluster, worker)
    await cluster.worker(answer_well)
    status, _ = await asyncio.wait_for(request, LEAVE_S)
    assert status == 200
    await cluster.all_released()
    assert cluster.controller.failed == cluster.controller.acquired[:1]
    assert await cluster.metric('fastserve_gateway_worker_failures_total{kind="frozen"}') == 1


async def test_a_stream_with_data_ends_with_an_error_event_when_its_worker_freezes(cluster: Cluster) -> None:
    worker = await add_worker(cluster, stream(EVENTS[0], then="hang"))
    request = asyncio.ensure_future(ask(cluster, STREAM))
    await freeze(cluster, worker)
    status, body = await asyncio.wait_for(request, LEAVE_S)
    assert status == 200
    assert body.startswith(EVENTS[0])
    assert error_event(body)["code"] == "worker_lost"


@BOTH
async def test_without_another_worker_it_is_503_with_retry_after(cluster: Cluster, body: Any) -> None:
    worker = await add_worker(cluster, hang)
    request = asyncio.ensure_future(cluster.post(body).__aenter__())
    await freeze(cluster, worker)
    response = await asyncio.wait_for(request, LEAVE_S)
    assert response.status == 503
    assert int(response.headers["retry-after"]) >= 1
    response.close()


async def test_a_worker_that_only_leaves_the_table_keeps_its_requests(cluster: Cluster) -> None:
    """Like one that shuts down, one that another API server cannot reach, and all after the controller's restart."""
    worker = await add_worker(cluster, stream(*EVENTS, DONE, delay_s=0.15))
    request = asyncio.ensure_future(ask(cluster, STREAM))
    await until(lambda: worker.running)
    await cluster.in_table()
    cluster.controller.workers.clear()
    polls = cluster.controller.polls
    assert await request == (200, WHOLE)
    assert cluster.controller.polls >= polls + 2  # the API server has seen a table without it
    await cluster.all_released()
    assert not cluster.controller.failed


async def test_a_worker_that_no_longer_listens_keeps_its_requests(cluster: Cluster) -> None:
    """Like one that shuts down: it accepts no connections while it finishes its requests."""
    worker = await add_worker(cluster, stream(*EVENTS, DONE, delay_s=0.15))
    request = asyncio.ensure_future(ask(cluster, STREAM))
    await until(lambda: worker.running)
    await cluster.in_table()
    await worker.stop_listening()
    cluster.controller.workers.clear()
    assert await request == (200, WHOLE)


async def test_while_the_controller_is_away_nothing_is_left(cluster: Cluster) -> None:
    worker = await add_worker(cluster, stream(*EVENTS, DONE, delay_s=0.15))
    request = asyncio.ensure_future(ask(cluster, STREAM))
    await until(lambda: worker.running)
    await cluster.in_table()
    await cluster.controller.kill()
    assert await request == (200, WHOLE)
