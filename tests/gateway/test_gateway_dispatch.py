"""Requests are served while the controller is away, hung, or restarted and still without workers."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.controller import create_app as create_controller
from fastserve.gateway import dispatch
from fastserve.gateway.app import create_app
from fastserve.gateway.dispatch import Dispatcher, open_dispatcher
from fastserve.gateway.table import MISSING_GRACE_S, SUSPECT_S, CachedTable
from fastserve.protocol import HeartbeatRequest, RoutingTable, WorkerEntry, WorkerStatus
from tests.gateway.cluster import CHAT, DONE, EVENTS, Cluster, StubWorker, answer_well, die, serve_app, stream, until
from tests.keys import CLUSTER

STREAM = {**CHAT, "stream": True}


async def ask(cluster: Cluster, body: Any = None) -> int:
    async with cluster.post(body) as response:
        await response.read()
        return int(response.status)


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str]:
    return response.status, (await response.json())["error"]["code"]


# ---- the table alone --------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def table_of(*rows: tuple[str, int, float]) -> RoutingTable:
    workers = [
        WorkerEntry(address=address, status=WorkerStatus(model_names=["m"]), in_flight=in_flight, speed=speed)
        for address, in_flight, speed in rows
    ]
    return RoutingTable(dispatch_method="shortest_queue", workers=workers)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cached(clock: Clock) -> CachedTable:
    return CachedTable(clock, random.Random(0))


def test_the_least_loaded_for_its_speed_is_chosen(cached: CachedTable) -> None:
    cached.update(table_of(("a", 4, 1.0), ("b", 6, 2.0), ("c", 5, 1.0)), {})
    assert cached.choose("m", "chat", [], {}) == "b"
    assert cached.choose("m", "chat", ["b"], {}) == "a"
    assert cached.choose("m", "chat", ["b"], {"a": 2}) == "c"
    assert cached.choose("other", "chat", [], {}) == ""


def test_own_requests_are_not_counted_twice(cached: CachedTable) -> None:
    cached.update(table_of(("a", 4, 1.0), ("b", 2, 1.0)), {"a": 4})
    assert cached.choose("m", "chat", [], {"a": 1}) == "a"


def test_ties_are_broken_at_random(cached: CachedTable) -> None:
    cached.update(table_of(("a", 0, 1.0), ("b", 0, 1.0)), {})
    assert {cached.choose("m", "chat", [], {}) for _ in range(50)} == {"a", "b"}


def test_a_suspect_comes_last_for_a_while(cached: CachedTable, clock: Clock) -> None:
    cached.update(table_of(("a", 0, 1.0), ("b", 9, 1.0)), {})
    cached.suspect("a")
    assert cached.choose("m", "chat", [], {}) == "b"
    assert cached.choose("m", "chat", ["b"], {}) == "a"
    clock.now += SUSPECT_S
    assert cached.choose("m", "chat", [], {}) == "a"


def test_a_worker_missing_from_the_table_is_kept_for_a_while(cached: CachedTable, clock: Clock) -> None:
    cached.update(table_of(("a", 0, 1.0), ("b", 9, 1.0)), {})
    clock.now += 3600  # the controller was away for an hour and has dropped a
    cached.update(table_of(("b", 9, 1.0)), {})
    assert cached.choose("m", "chat", [], {}) == "b"
    assert cached.choose("m", "chat", ["b"], {}) == "a"
    clock.now += MISSING_GRACE_S
    cached.update(table_of(("b", 9, 1.0)), {})
    assert cached.choose("m", "chat", ["b"], {}) == ""


def test_models_are_listed_from_an_empty_table_only_for_a_while(cached: CachedTable, clock: Clock) -> None:
    cached.update(table_of(("a", 0, 1.0)), {})
    cached.update(table_of(), {})
    assert cached.model_names() == ["m"]
    clock.now += MISSING_GRACE_S
    cached.update(table_of(), {})
    assert cached.model_names() == []


# ---- the background tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["poll", "send_releases"])
async def test_a_background_task_that_fails_is_logged_and_started_again(
    task: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    starts = 0

    async def broken(_: Dispatcher) -> None:
        nonlocal starts
        starts += 1
        raise KeyError("a defect")

    monkeypatch.setattr(Dispatcher, task, broken)
    monkeypatch.setattr(dispatch, "RESTART_PAUSE_S", 0.01)
    async with aiohttp.ClientSession() as session, open_dispatcher(session, "http://127.0.0.1:9"):
        await until(lambda: starts >= 3)
    record = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


# ---- with a controller that comes and goes ----------------------------------------------------------------------


async def test_no_request_fails_when_the_controller_is_killed_under_load(cluster: Cluster) -> None:
    for _ in range(2):
        await cluster.worker(stream(EVENTS[0], DONE, delay_s=0.005))
    await cluster.in_table()
    statuses: list[int] = []
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            statuses.append(await ask(cluster, STREAM))

    async def served(count: int) -> None:
        before = len(statuses)
        await until(lambda: len(statuses) > before + count, timeout=20)

    clients = [asyncio.ensure_future(client()) for _ in range(8)]
    await served(50)
    await cluster.controller.kill()
    await served(100)
    known = dict(cluster.controller.workers)
    cluster.controller.workers.clear()
    cluster.controller.in_flight.clear()
    acquired = len(cluster.controller.acquired)
    await cluster.controller.start()
    await until(lambda: len(cluster.controller.acquired) > acquired, timeout=20)
    await served(100)  # no workers, as before the first heartbeat
    cluster.controller.workers.update(known)
    await served(50)
    stop.set()
    await asyncio.gather(*clients)
    assert set(statuses) == {200}
    loads = [len(worker.requests) for worker in cluster.workers]
    assert min(loads) > 0.3 * sum(loads)
    await until(lambda: not cluster.controller.in_flight)


async def test_without_the_controller_requests_do_not_wait_for_it(cluster: Cluster) -> None:
    await cluster.worker(answer_well)
    await cluster.in_table()
    cluster.controller.hangs = True
    assert await ask(cluster) == 200
    began = time.monotonic()
    for _ in range(5):
        assert await ask(cluster) == 200
    assert time.monotonic() - began < 2.5, "not the second after which each would give up waiting"
    cluster.controller.hangs = False
    acquired = len(cluster.controller.acquired)

    async with asyncio.timeout(5):
        while len(cluster.controller.acquired) == acquired:
            assert await ask(cluster) == 200


async def test_without_the_controller_a_failed_worker_is_replaced(cluster: Cluster) -> None:
    broken = await cluster.worker(die)
    await cluster.worker(answer_well)
    await cluster.in_table()
    await cluster.controller.kill()
    for _ in range(6):
        assert await ask(cluster, STREAM) == 200
    assert len(broken.requests) <= 1  # after that it is suspected


async def test_no_table_yet_is_503_with_retry_after(cluster: Cluster) -> None:
    await cluster.controller.kill()
    async with cluster.post() as response:
        assert await error_of(response) == (503, "no_worker")
        assert int(response.headers["retry-after"]) >= 1
    async with cluster.http.get(cluster.url + "/ready") as response:
        assert response.status == 503
    async with cluster.http.get(cluster.url + "/health") as response:
        assert response.status == 200


async def test_an_unknown_model_is_404_and_a_known_one_without_workers_503(cluster: Cluster) -> None:
    await cluster.worker(answer_well)
    async with cluster.post({**CHAT, "model": "nobody"}) as response:
        assert await error_of(response) == (404, "model_not_found")
    await cluster.workers[0].kill()
    async with cluster.post() as response:
        assert await error_of(response) == (503, "worker_lost")


# ---- with the real controller -----------------------------------------------------------------------------------


async def test_with_the_real_controller_leases_come_and_go_and_a_failed_worker_leaves() -> None:
    async with (
        serve_app(create_controller(ControllerConfig(no_worker_probe=True))) as controller,
        serve_app(create_app(ApiServerConfig(controller_address=controller))) as url,
        aiohttp.ClientSession(headers=CLUSTER) as http,
    ):
        worker = StubWorker(answer_well)
        await worker.start()

        async def in_flight() -> list[int]:
            async with http.get(controller + "/workers") as response:
                table = RoutingTable.model_validate_json(await response.read())
            return [row.in_flight for row in table.workers]

        async def ask_once() -> int:
            async with http.post(url + "/v1/chat/completions", json=STREAM) as response:
                await response.read()
                return response.status

        assert await ask_once() == 404
        status = WorkerStatus(model_names=["demo"], heartbeat_interval_s=60.0)
        beat = HeartbeatRequest(worker_name=worker.address, queue_length=0, status=status)
        async with http.post(controller + "/receive_heart_beat", json=beat.model_dump()) as response:
            assert response.status == 200
        assert await ask_once() == 200
        worker.script = stream(b": alive\n\n", then="hang")
        async with http.post(url + "/v1/chat/completions", json=STREAM) as response:
            await response.content.readuntil(b"\n\n")
            assert await in_flight() == [1]
        async with asyncio.timeout(5):
            while True:
                if await in_flight() == [0]:
                    break
                await asyncio.sleep(0.01)
        await worker.kill()
        assert await ask_once() == 503
        async with http.post(controller + "/get_worker_address", json={"model": "demo"}) as response:
            assert (await response.json())["address"] == ""


async def test_an_endless_answer_in_the_controllers_place_is_cut_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_CONTROLLER_ANSWER_BYTES", 100_000)
    num_written = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal num_written
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 10_000)
            num_written += 10_000

    app = web.Application()
    app.router.add_get("/workers", endless)
    async with (
        TestServer(app) as server,
        aiohttp.ClientSession() as session,
        open_dispatcher(session, str(server.make_url(""))) as dispatcher,
    ):
        assert dispatcher.model_names() == []
        await until(lambda: num_written > 100_000)
    # The buffers of two sockets come on top; without a bound it would be all the data of a second.
    assert num_written < 20_000_000
