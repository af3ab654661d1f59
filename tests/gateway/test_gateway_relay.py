"""The relay: bytes are unchanged, failed workers are replaced, and disconnects of clients are noticed."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web

from fastserve.protocol import LEASE_HEADER, WorkerStatus
from tests.gateway.cluster import (
    ANSWER,
    CHAT,
    DONE,
    EVENTS,
    MODEL,
    Cluster,
    Script,
    abort,
    answer_well,
    die,
    hang,
    respond,
    start_cluster,
    stream,
    until,
)
from tests.processes import free_ports

STREAM = {**CHAT, "stream": True}
WHOLE = b"".join(EVENTS) + DONE
FULL = {"error": {"message": "full", "type": "overloaded_error", "param": None, "code": "overloaded"}}


async def ask(cluster: Cluster, body: Any = None, **options: Any) -> tuple[int, bytes]:
    async with cluster.post(body, **options) as response:
        return response.status, await response.read()


def error_event(body: bytes) -> dict[str, Any]:
    """The error of a stream, which must end with one error event and [DONE]."""
    *_, event, done = body.removesuffix(b"\n\n").split(b"\n\n")
    assert done == b"data: [DONE]"
    error = json.loads(event.removeprefix(b"data: "))["error"]
    return dict(error)


# ---- pass-through -----------------------------------------------------------------------------------------------


async def test_stream_bytes_pass_through_unchanged(cluster: Cluster) -> None:
    pieces = [
        b": waiting\n\n",
        EVENTS[0][:7],
        EVENTS[0][7:] + EVENTS[1] + b": [[1],[2]]\n\nda",
        EVENTS[2][2:-1],
        b"\n",
        DONE,
    ]
    await cluster.worker(stream(*pieces, delay_s=0.02))
    async with cluster.post(STREAM) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert await response.read() == b"".join(pieces)


async def test_stream_with_carriage_returns_passes_through(cluster: Cluster) -> None:
    pieces = [piece.replace(b"\n", b"\r\n") for piece in (b": ping\n\n", *EVENTS, DONE)]
    await cluster.worker(stream(*pieces, delay_s=0.01))
    assert await ask(cluster, STREAM) == (200, b"".join(pieces))


async def test_stream_pieces_are_not_held_back(cluster: Cluster) -> None:
    await cluster.worker(stream(b": waiting\n\n", EVENTS[0], then="hang"))
    async with cluster.post(STREAM) as response:
        assert await asyncio.wait_for(response.content.readuntil(b"\n\n"), 1) == b": waiting\n\n"
        assert await asyncio.wait_for(response.content.readuntil(b"\n\n"), 1) == EVENTS[0]


async def test_answer_and_request_bytes_pass_through_unchanged(cluster: Cluster) -> None:
    worker = await cluster.worker(answer_well)
    body = b' {"messages" : [], "temperature":0.70,"\\u006dodel":"demo", "unknown":[1e3,null]}'
    async with cluster.http.post(cluster.url + "/v1/completions", data=body) as response:
        assert (response.status, await response.json()) == (200, ANSWER)
        assert response.headers["content-type"].startswith("application/json")
    path, headers, sent = worker.requests[0]
    assert (path, sent) == ("/v1/completions", body)
    assert headers[LEASE_HEADER] == cluster.controller.acquired[0]


async def test_a_client_error_passes_at_once_and_is_not_retried(cluster: Cluster) -> None:
    first = await cluster.worker(answer_well)
    second = await cluster.worker(answer_well)
    for body in (CHAT, STREAM):
        first.script = answer_well
        assert (await ask(cluster, body))[0] == 200
        first.script = respond(400, {"error": {"message": "bad"}})
        assert await ask(cluster, body) == (400, b'{"error": {"message": "bad"}}')
    assert len(first.requests) == 4
    assert not second.requests
    assert not cluster.controller.failures


# ---- retries ----------------------------------------------------------------------------------------------------


def after_reset_once_connected() -> Script:
    """A worker that sends its headers and dies."""

    async def script(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        abort(request)
        return response

    return script


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(die, id="reset before headers"),
        pytest.param(after_reset_once_connected(), id="reset after headers"),
        pytest.param(stream(b": alive\n\n", then="reset"), id="reset after comments"),
        pytest.param(stream(b": alive\n\n", b": al", then="reset"), id="reset within a comment"),
        pytest.param(stream(b": alive\n\n", EVENTS[0][:9], then="reset"), id="reset within the first event"),
        pytest.param(stream(b": alive\n\n"), id="clean end without data"),
    ],
)
async def test_a_worker_lost_before_data_is_replaced_unseen(cluster: Cluster, broken: Script) -> None:
    first = await cluster.worker(broken)
    second = await cluster.worker(answer_well)
    status, body = await ask(cluster, STREAM)
    assert status == 200
    assert body.removeprefix(b": alive\n\n") == WHOLE
    assert len(first.requests) == len(second.requests) == 1
    assert cluster.controller.failures == [first.address]
    assert cluster.controller.excluded == [[], [first.address]]
    assert await cluster.metric("fastserve_gateway_retries_total") == 1
    await cluster.all_released()


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_a_refused_connection_is_retried_elsewhere(cluster: Cluster, body: Any) -> None:
    cluster.controller.add(f"http://127.0.0.1:{free_ports(1)[0]}")
    await cluster.worker(answer_well)
    status, _ = await ask(cluster, body)
    assert status == 200
    assert len(cluster.controller.failures) == 1
    assert await cluster.metric('fastserve_gateway_worker_failures_total{kind="refused"}') == 1


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_a_worker_that_breaks_off_untyped_is_replaced(cluster: Cluster, body: Any) -> None:
    """This is uvicorn's answer for a request that outlasts the drain time of a worker that shuts down."""
    await cluster.worker(break_off)
    status, answer = await ask(cluster, body)
    assert status == 502
    assert b"bad_worker_answer" in answer
    await cluster.worker(answer_well)
    assert (await ask(cluster, body))[0] == 200


async def break_off(_: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text="Internal Server Error")


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_a_worker_without_openai_routes_is_passed_over(cluster: Cluster, body: Any) -> None:
    """FastChat's workers register like ours, but speak only FastChat's protocol."""
    foreign = await cluster.worker(respond(404, {"detail": "Not Found"}))
    status, answer = await ask(cluster, body)
    assert status == 503
    assert b"FastChat" in answer
    await cluster.worker(answer_well)
    assert (await ask(cluster, body))[0] == 200
    assert not cluster.controller.failures
    assert foreign.requests


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_worker_that_refuses_is_replaced_but_not_reported(cluster: Cluster, body: Any, status: int) -> None:
    first = await cluster.worker(respond(status, FULL))
    await cluster.worker(answer_well)
    assert (await ask(cluster, body))[0] == 200
    assert len(first.requests) == 1
    assert not cluster.controller.failures


async def test_a_refusal_after_comments_is_retried_and_a_client_error_ends_the_stream(cluster: Cluster) -> None:
    def error_data(error_type: str) -> bytes:
        return b'data: {"error": {"message": "gone", "type": "%s"}}\n\n' % error_type.encode()

    first = await cluster.worker(stream(b": alive\n\n", error_data("service_unavailable_error"), DONE, delay_s=0.02))
    await cluster.worker(answer_well)
    assert await ask(cluster, STREAM) == (200, b": alive\n\n" + WHOLE)
    first.script = answer_well
    assert (await ask(cluster, STREAM))[0] == 200
    first.script = stream(b": alive\n\n", error_data("invalid_request_error"), DONE, delay_s=0.02)
    status, body = await ask(cluster, STREAM)
    assert (status, body[:9]) == (200, b": alive\n\n")
    assert error_event(body)["type"] == "invalid_request_error"
    first.script = answer_well
    assert (await ask(cluster, STREAM))[0] == 200
    # Without a comment before it, the error has its own status.
    first.script = stream(error_data("invalid_request_error"), DONE)
    assert (await ask(cluster, STREAM))[0] == 400
    assert not cluster.controller.failures


async def test_a_whole_answer_cut_short_is_retried(cluster: Cluster) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "100"})
        await response.prepare(request)
        await response.write(b'{"id"')
        await asyncio.sleep(0.02)
        abort(request)
        return response

    await cluster.worker(cut)
    await cluster.worker(answer_well)
    status, body = await ask(cluster)
    assert (status, json.loads(body)) == (200, ANSWER)


async def test_all_workers_full_gives_the_last_429_with_its_retry_after(cluster: Cluster) -> None:
    for seconds in ("3", "7"):
        await cluster.worker(respond(429, FULL, {"Retry-After": seconds}))
    for body in (CHAT, STREAM):
        async with cluster.post(body) as response:
            assert (response.status, await response.json()) == (429, FULL)
            assert response.headers["retry-after"] in ("3", "7")
    assert [len(worker.requests) for worker in cluster.workers] == [2, 2]


async def test_the_only_worker_lost_is_503_worker_lost(cluster: Cluster) -> None:
    worker = await cluster.worker(die)
    async with cluster.post(STREAM) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "worker_lost"
        assert int(response.headers["retry-after"]) >= 1
    assert len(worker.requests) == 1
    await cluster.all_released()


async def test_lost_after_data_ends_the_stream_with_an_error_event(cluster: Cluster) -> None:
    await cluster.worker(stream(EVENTS[0], EVENTS[1], EVENTS[2][:11], delay_s=0.02, then="reset"))
    other = await cluster.worker(answer_well)
    status, body = await ask(cluster, STREAM)
    assert status == 200
    # The incomplete event is left out.
    assert body.startswith(EVENTS[0] + EVENTS[1] + b'data: {"error"')
    assert error_event(body)["code"] == "worker_lost"
    assert not other.requests
    assert await cluster.metric("fastserve_gateway_broken_streams_total") == 1
    await cluster.all_released()


async def test_a_clean_end_without_done_is_a_lost_worker(cluster: Cluster) -> None:
    await cluster.worker(stream(EVENTS[0]))
    _, body = await ask(cluster, STREAM)
    assert body.startswith(EVENTS[0])
    assert error_event(body)["code"] == "worker_lost"


async def test_comments_then_no_worker_ends_with_an_error_event(cluster: Cluster) -> None:
    await cluster.worker(stream(b": alive\n\n", delay_s=0.05, then="reset"))
    await cluster.worker(respond(429, FULL))
    status, body = await ask(cluster, STREAM)
    assert (status, body[:9]) == (200, b": alive\n\n")
    assert error_event(body) == FULL["error"]


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_a_silent_worker_is_given_up_for_another(body: Any) -> None:
    async with start_cluster(worker_timeout_s=0.3) as cluster:
        silent = await cluster.worker(hang)
        await cluster.worker(answer_well)
        assert (await ask(cluster, body))[0] == 200
        assert cluster.controller.failures == [silent.address]
        await until(lambda: silent.aborted_at)


async def test_silence_of_all_workers_is_504(cluster: Cluster) -> None:
    async with start_cluster(worker_timeout_s=0.2) as short:
        await short.worker(hang)
        async with short.post(STREAM) as response:
            assert response.status == 504
            assert (await response.json())["error"]["code"] == "worker_timeout"


async def test_a_long_answer_is_awaited_while_the_worker_lists_its_lease() -> None:
    async with start_cluster(worker_timeout_s=1.5) as cluster:

        async def slow(request: web.Request) -> web.StreamResponse:
            status = WorkerStatus(model_names=[MODEL], leases=[request.headers[LEASE_HEADER]])
            cluster.controller.workers[worker.address] = status
            await asyncio.sleep(2.0)
            return web.json_response(ANSWER)

        worker = await cluster.worker(slow)
        assert (await ask(cluster))[0] == 200
        assert len(worker.requests) == 1
        assert not cluster.controller.failures


@pytest.mark.parametrize("trouble", ["away", "busy"])
async def test_a_long_answer_is_awaited_while_the_controller_cannot_be_asked(trouble: str) -> None:
    async with start_cluster(worker_timeout_s=0.3) as cluster:

        async def slow(_: web.Request) -> web.StreamResponse:
            if trouble == "away":
                await cluster.controller.kill()
            await asyncio.sleep(1.5)
            return web.json_response(ANSWER)

        cluster.controller.is_busy = trouble == "busy"
        worker = await cluster.worker(slow)
        assert (await ask(cluster))[0] == 200
        assert len(worker.requests) == 1


async def test_a_restarted_worker_is_no_failure(cluster: Cluster) -> None:
    worker = await cluster.worker(answer_well)
    assert (await ask(cluster))[0] == 200

    # The next request gets a pooled connection that is dead, as after a restart of the worker.
    async def dead_once(request: web.Request) -> web.StreamResponse:
        worker.script = answer_well
        return await die(request)

    worker.script = dead_once
    assert (await ask(cluster))[0] == 200
    await worker.kill()
    await worker.start()
    assert (await ask(cluster, STREAM))[0] == 200
    assert not cluster.controller.failures


# ---- clients that go away ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "script"),
    [
        pytest.param(CHAT, hang, id="whole"),
        pytest.param(STREAM, hang, id="before the first byte"),
        pytest.param(STREAM, stream(b": alive\n\n", then="hang"), id="after a comment"),
        pytest.param(STREAM, stream(*EVENTS * 400, delay_s=0.005), id="amid data"),
    ],
)
async def test_a_client_gone_closes_the_worker_connection_within_200_ms(
    cluster: Cluster, body: Any, script: Script
) -> None:
    worker = await cluster.worker(script)
    request = asyncio.ensure_future(ask(cluster, body))
    await until(lambda: worker.running == 1)
    await asyncio.sleep(0.05)
    gone_at = asyncio.get_running_loop().time()
    request.cancel()
    await until(lambda: worker.aborted_at)
    assert worker.aborted_at[0] - gone_at < 0.2
    await cluster.all_released()
    assert not cluster.controller.failures
    await until(lambda: worker.running == 0)
    assert await cluster.metric("fastserve_gateway_requests_in_flight") == 0
    assert await cluster.metric('fastserve_gateway_requests_total{route="/v1/chat/completions",status="499"}') == 1


async def test_all_leases_are_released_after_mixed_requests(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    number = 0

    async def moody(request: web.Request) -> web.StreamResponse:
        nonlocal number
        number += 1
        moods: list[Script] = [
            answer_well,
            respond(503, FULL),
            stream(EVENTS[0], delay_s=0.03),
            stream(*EVENTS * 20, DONE, delay_s=0.002),
            stream(b": x\n\n", then="reset"),
            respond(400, FULL),
        ]
        return await moods[number % len(moods)](request)

    for _ in range(3):
        await cluster.worker(moody)

    async def one(number: int) -> None:
        async with asyncio.timeout(0.02 if number % 7 == 0 else 20):
            await ask(cluster, STREAM if number % 3 else CHAT)

    with caplog.at_level(logging.ERROR):
        ended = await asyncio.gather(*map(one, range(100)), return_exceptions=True)
    assert all(outcome is None or isinstance(outcome, TimeoutError) for outcome in ended)
    await cluster.all_released()
    await until(lambda: sum(worker.running for worker in cluster.workers) == 0)
    assert await cluster.metric("fastserve_gateway_requests_in_flight") == 0
    assert not caplog.records
