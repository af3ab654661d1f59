"""Workers that fail, refuse or kill: no client sees it while a healthy one exists, and no request visits them all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.controller import create_app as create_controller
from fastserve.gateway.app import create_app
from fastserve.gateway.outliers import AVOID_S, OVERRULED_LIMIT
from fastserve.protocol import HeartbeatRequest, WorkerStatus
from tests.gateway.cluster import (
    CHAT,
    DONE,
    EVENTS,
    MODEL,
    Cluster,
    Script,
    StubWorker,
    answer_well,
    die,
    hang,
    respond,
    serve_app,
    start_cluster,
    stream,
    until,
)
from tests.gateway.test_gateway_relay import STREAM, ask, error_event
from tests.keys import UNGUARDED
from tests.processes import free_ports

BROKEN = {"error": {"message": "broken", "type": "internal_error", "param": None, "code": "internal_error"}}
WRONG = {"error": {"message": "wrong", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}}
FULL = {"error": {"message": "full", "type": "overloaded_error", "param": None, "code": "overloaded"}}
SHUT = {"error": {"message": "shut", "type": "service_unavailable_error", "param": None, "code": "draining"}}
BOTH = pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])


# ---- attempts ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("script", "status"),
    [
        pytest.param(respond(500, BROKEN), 500, id="500"),
        pytest.param(respond(502, BROKEN), 502, id="502"),
        pytest.param(respond(503, SHUT), 503, id="503"),
        pytest.param(respond(429, FULL), 429, id="429"),
        pytest.param(stream(b": alive\n\n"), 200, id="cut"),
    ],
)
async def test_a_request_visits_three_of_many_failing_workers(
    cluster: Cluster, body: Any, script: Script, status: int
) -> None:
    for _ in range(12):
        await cluster.worker(script)
    if body is CHAT and status == 200:
        status = 502  # a stream instead of one JSON answer
    got, answer = await ask(cluster, body)
    assert got == status
    assert b'"error"' in answer
    assert cluster.num_requests == 3
    await cluster.all_released()


async def test_the_number_of_attempts_is_an_option() -> None:
    async with start_cluster(max_attempts=1) as cluster:
        await cluster.worker(respond(500, BROKEN))
        await cluster.worker(answer_well)
        assert await ask(cluster) == (500, json.dumps(BROKEN).encode())


async def test_workers_that_refuse_connections_do_not_use_up_the_attempts(cluster: Cluster) -> None:
    for _ in range(5):
        cluster.controller.add(f"http://127.0.0.1:{free_ports(1)[0]}")
    await cluster.worker(answer_well)
    assert (await ask(cluster))[0] == 200


@BOTH
async def test_one_worker_that_always_fails_is_never_seen(cluster: Cluster, body: Any) -> None:
    bad = await cluster.worker(respond(500, BROKEN))
    await cluster.worker(answer_well)
    for _ in range(10):
        assert (await ask(cluster, body))[0] == 200
    await cluster.all_released()
    assert len(cluster.controller.failed) == len(bad.requests)


async def test_error_events_before_data_count_like_their_statuses(cluster: Cluster) -> None:
    event = b"data: " + json.dumps(BROKEN).encode() + b"\n\n"
    first = await cluster.worker(stream(b": alive\n\n", event, DONE, delay_s=0.02))
    assert (await ask(cluster, STREAM))[0] == 200  # the stream had already begun
    first.script = stream(event, DONE)
    assert (await ask(cluster, STREAM))[0] == 500
    await cluster.worker(answer_well)
    assert (await ask(cluster, STREAM))[0] == 200
    await cluster.all_released()
    assert len(cluster.controller.failed) == 3


# ---- the retry budget -------------------------------------------------------------------------------------------


async def test_retries_of_all_requests_stay_within_the_budget() -> None:
    async with start_cluster(retry_budget_percent=20.0, min_retries_per_s=0.5) as cluster:
        for _ in range(3):
            await cluster.worker(respond(500, BROKEN))
        statuses = {(await ask(cluster, CHAT))[0] for _ in range(50)}
        assert statuses == {500}
        assert 50 < cluster.num_requests <= 50 + 0.2 * 50 + 5
        assert await cluster.metric("fastserve_gateway_retries_denied_total") > 0


async def test_the_death_of_a_busy_worker_is_outside_the_budget() -> None:
    async with start_cluster(retry_budget_percent=0.0, min_retries_per_s=0.0) as cluster:
        busy = await cluster.worker(hang)
        requests = [asyncio.ensure_future(ask(cluster)) for _ in range(40)]
        await until(lambda: busy.running == 40)
        await cluster.worker(answer_well)
        await busy.kill()
        assert {status for status, _ in await asyncio.gather(*requests)} == {200}


# ---- requests that kill -----------------------------------------------------------------------------------------


@BOTH
async def test_a_request_that_kills_workers_is_stopped_after_two(cluster: Cluster, body: Any) -> None:
    for _ in range(4):
        await cluster.worker(die)
    async with cluster.post(body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (500, "request_killed_workers")
        assert response.headers["x-should-retry"] == "false"
    assert cluster.num_requests == 2
    await cluster.all_released()
    assert len(cluster.controller.failed) == 2


async def test_a_request_that_kills_over_pooled_connections_is_noticed_too(cluster: Cluster) -> None:
    """Lose the connection with the request on it, and end the worker for good."""

    async def die_for_good(request: web.Request) -> web.StreamResponse:
        worker = next(one for one in cluster.workers if one.port == request.transport.get_extra_info("sockname")[1])  # type: ignore[union-attr]
        asyncio.get_running_loop().call_soon(lambda: killings.append(asyncio.ensure_future(worker.kill())))
        await asyncio.sleep(10)
        return web.Response()

    killings: list[asyncio.Future[None]] = []
    for _ in range(4):
        worker = await cluster.worker(answer_well)
        # To open a pooled connection to each.
        assert (await ask(cluster))[0] == 200
        cluster.controller.workers.pop(worker.address)
    for worker in cluster.workers:
        cluster.controller.add(worker.address)
        worker.script = die_for_good
    status, answer = await ask(cluster, STREAM)
    assert (status, json.loads(answer)["error"]["code"]) == (500, "request_killed_workers")
    await asyncio.gather(*killings)
    assert len(killings) == 2


async def test_killing_after_comments_ends_with_an_error_event(cluster: Cluster) -> None:
    for _ in range(3):
        await cluster.worker(stream(b": alive\n\n", delay_s=0.02, then="reset"))
    status, body = await ask(cluster, STREAM)
    assert status == 200
    assert error_event(body)["code"] == "request_killed_workers"
    assert cluster.num_requests == 2


# ---- workers that refuse everything -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 503])
async def test_a_worker_that_refuses_everything_is_overruled_and_avoided(
    cluster: Cluster, body: Any, status: int
) -> None:
    refusing = await cluster.worker(respond(status, WRONG if status < 429 else FULL))
    await cluster.worker(answer_well)
    for _ in range(20):
        assert (await ask(cluster, body))[0] == 200
    assert len(refusing.requests) == OVERRULED_LIMIT
    assert AVOID_S >= 10.0
    await cluster.all_released()
    # It answered, so it is no failure, but no success either.
    assert not cluster.controller.failed
    assert len(cluster.controller.unused) == len(refusing.requests)


async def test_an_avoided_worker_serves_when_it_is_the_only_one(cluster: Cluster) -> None:
    refusing = await cluster.worker(respond(400, WRONG))
    good = await cluster.worker(answer_well)
    for _ in range(OVERRULED_LIMIT + 1):
        assert (await ask(cluster))[0] == 200
    refusing.script = answer_well
    await good.kill()
    assert (await ask(cluster))[0] == 200
    assert len(refusing.requests) == OVERRULED_LIMIT + 1


@BOTH
async def test_a_client_error_that_workers_agree_on_is_the_clients(cluster: Cluster, body: Any) -> None:
    for _ in range(3):
        await cluster.worker(respond(400, WRONG))
    for number in range(1, 4):
        assert await ask(cluster, body) == (400, json.dumps(WRONG).encode())
        assert cluster.num_requests == 2 * number  # two agree, and a third is not tried
    await cluster.all_released()
    assert not cluster.controller.failed


async def test_a_client_error_of_the_only_worker_passes(cluster: Cluster) -> None:
    worker = await cluster.worker(respond(400, WRONG))
    assert await ask(cluster) == (400, json.dumps(WRONG).encode())
    assert len(worker.requests) == 1


@BOTH
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, {"message": "no such model", "type": "invalid_request_error", "code": "model_not_found"}),
        (404, {"message": "model 'x' not found", "type": "api_error", "param": None, "code": None}),
        (404, {"message": "File Not Found", "type": "not_found_error", "code": 404}),
        (404, {"message": "There is no route", "type": "invalid_request_error", "code": "unknown_route"}),
        (405, {"message": "not possible", "type": "invalid_request_error", "code": "wrong_method"}),
    ],
    ids=["model", "model without a code", "file", "route", "method"],
)
async def test_workers_that_do_not_know_their_model_are_503(
    cluster: Cluster, body: Any, status: int, error: dict[str, Any]
) -> None:
    await cluster.worker(respond(status, {"error": error}))
    async with cluster.post(body) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "no_worker")
        assert int(response.headers["retry-after"]) >= 1
    await cluster.worker(answer_well)
    assert (await ask(cluster, body))[0] == 200


# ---- what is reported -------------------------------------------------------------------------------------------


async def test_each_lease_is_released_with_its_outcome(cluster: Cluster) -> None:
    cases: list[tuple[str, Script, Any]] = [
        ("success", answer_well, CHAT),
        ("success", answer_well, STREAM),
        ("failed", respond(500, BROKEN), CHAT),
        ("failed", stream(EVENTS[0], delay_s=0.02, then="reset"), STREAM),
        ("failed", respond(200, {"hello": "world"}), CHAT),
        ("failed", die, CHAT),
        ("unused", respond(429, FULL), CHAT),
        ("unused", respond(503, SHUT), STREAM),
        ("unused", respond(400, WRONG), CHAT),
    ]
    for number, (outcome, script, body) in enumerate(cases):
        await cluster.worker(script, f"m{number}")
        await ask(cluster, {**body, "model": f"m{number}"})
        await cluster.all_released()
        seen = cluster.controller.granted[-1]
        assert (seen in cluster.controller.failed) == (outcome == "failed"), (number, outcome)
        assert (seen in cluster.controller.unused) == (outcome == "unused"), (number, outcome)


async def test_a_client_that_disconnects_counts_neither_as_success_nor_as_failure(cluster: Cluster) -> None:
    worker = await cluster.worker(hang)
    request = asyncio.ensure_future(ask(cluster))
    await until(lambda: worker.running)
    request.cancel()
    await cluster.all_released()
    assert cluster.controller.unused == cluster.controller.acquired
    assert not cluster.controller.failed


# ---- with the real controller -----------------------------------------------------------------------------------


@asynccontextmanager
async def real_trio(*scripts: Script) -> AsyncIterator[tuple[Callable[[Any], Awaitable[int]], list[StubWorker]]]:
    """Run a controller and an API server with these workers, which send heartbeats; yields a function that asks."""
    async with AsyncExitStack() as stack:
        controller = await stack.enter_async_context(serve_app(create_controller(ControllerConfig(**UNGUARDED))))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        workers = []
        for script in scripts:
            worker = StubWorker(script)
            await worker.start()
            stack.push_async_callback(worker.kill)
            workers.append(worker)

        async def beat() -> None:
            for worker in workers:
                status = WorkerStatus(model_names=[MODEL], heartbeat_interval_s=1.0)
                message = HeartbeatRequest(worker_name=worker.address, queue_length=0, status=status)
                async with http.post(controller + "/receive_heart_beat", json=message.model_dump()) as response:
                    assert response.status == 200

        async def beat_on() -> None:
            while True:
                await asyncio.sleep(0.5)
                await beat()

        async def ask_once(body: Any) -> int:
            async with http.post(url + "/v1/chat/completions", json=body) as response:
                await response.read()
                return response.status

        await beat()
        beating = asyncio.ensure_future(beat_on())
        stack.callback(beating.cancel)
        # With the workers in its first table, it does not depend on a controller that is slow on a busy machine.
        url = await stack.enter_async_context(serve_app(create_app(ApiServerConfig(controller_address=controller))))
        yield ask_once, workers


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(respond(500, BROKEN), id="500"),
        pytest.param(respond(502, BROKEN), id="502"),
        pytest.param(respond(200, {"hello": "world"}), id="nonsense"),
        pytest.param(respond(400, WRONG), id="400"),
        pytest.param(respond(429, FULL), id="429"),
        pytest.param(die, id="connection lost"),
    ],
)
async def test_a_worker_that_always_fails_gets_a_handful_of_requests(script: Script) -> None:
    async with real_trio(script, answer_well, answer_well) as (ask_once, workers):
        for _ in range(10):
            bodies = [CHAT, STREAM] * 5
            assert set(await asyncio.gather(*map(ask_once, bodies))) == {200}
        chats = [sum(path == "/v1/chat/completions" for path, _, _ in worker.requests) for worker in workers]
        assert 1 <= chats[0] <= 12
        assert chats[1] + chats[2] == 100
