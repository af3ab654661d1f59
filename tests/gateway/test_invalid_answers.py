"""Invalid answers of workers: clients get another worker's answer, or one clear error, and memory stays bounded."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import psutil
import pytest
from aiohttp import web

from tests.gateway.cluster import (
    ANSWER,
    CHAT,
    DONE,
    EVENTS,
    MODEL,
    Cluster,
    Script,
    answer_well,
    raw,
    reply,
    start_cluster,
    stream,
    until,
)
from tests.gateway.test_gateway_relay import STREAM, WHOLE, ask, error_event

HTML = b"<html><body><h1>It works!</h1></body></html>"
SSE = "text/event-stream"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(content_type: str, body: bytes) -> bytes:
    return HEAD % content_type.encode() + body


def pieces(content_type: str, piece: bytes, count: int) -> Script:
    """Send a body of unknown length that repeats the piece."""

    async def script(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": content_type})
        await response.prepare(request)
        for _ in range(count):
            await response.write(piece)
        return response

    return script


EITHER: dict[str, Script] = {
    "html": reply(HTML, "text/html"),
    "html with 500": reply(HTML, "text/html", 500),
    "html with 503": reply(HTML, "text/html", 503),
    "html with 404": reply(HTML, "text/html", 404),
    "redirect": reply(b"", "text/plain", 302, location="http://127.0.0.1:1/"),
    "redirect to itself": reply(b"", status=307, location="/v1/chat/completions"),
    "no content": reply(b"", status=204),
    "created": reply(json.dumps(ANSWER).encode(), status=201),
    "400 in another shape": reply(b'{"detail":"no"}', status=400),
    "500 in another shape": reply(b"null", status=500),
    "our key is refused": reply(b'{"error":{"message":"key?"}}', status=401),
    "another protocol": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a header that is none": raw(b"HTTP/1.1 200 OK\r\nbroken header\r\n\r\n"),
    "an endless header": raw(b"HTTP/1.1 200 OK\r\nx: " + b"a" * 100_000 + b"\r\n\r\n"),
    "endless headers": raw(b"HTTP/1.1 200 OK\r\n" + b"x: 1\r\n" * 5_000 + b"\r\n"),
    "a status that is none": raw(
        b'HTTP/1.1 999 x\r\ncontent-type: application/json\r\ncontent-length: 27\r\n\r\n{"error":{"message":"what"}}'
    ),
    "no status": raw(b"HTTP/1.1 \r\n\r\n"),
    "nothing but interim answers": raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "upgrade": raw(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
}
WHOLE_ONLY: dict[str, Script] = {
    "empty body": reply(b""),
    "blank body": reply(b"   "),
    "no json": reply(b"hello"),
    "half json": reply(json.dumps(ANSWER).encode()[:-1]),
    "bad utf-8": reply(b'{"choices":[{"x":"\xff"}]}'),
    "json of another shape": reply(b'{"object":"list","data":[]}'),
    "no choice": reply(b'{"choices":[]}'),
    "choices that are text": reply(b'{"choices":"all"}'),
    "a list": reply(b"[]"),
    "a choice that is null": reply(b'{"choices":[null]}'),
    "a message that is text": reply(b'{"choices":[{"index":0,"message":"12"}]}'),
    "a text that is none": reply(b'{"choices":[{"index":0,"text":["12"]}]}'),
    "a finish reason that is none": reply(b'{"choices":[{"index":0,"finish_reason":5,"message":{}}]}'),
    "two answers": reply(json.dumps(ANSWER).encode() * 2),
    "shorter than announced": raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n"
        + json.dumps(ANSWER).encode()
    ),
    "longer than announced": raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n" + json.dumps(ANSWER).encode()
    ),
    "nested too deep": reply(b'{"choices":[{}],"x":' + b"[" * 100_000),
    "wrong type of content": reply(json.dumps(ANSWER).encode(), "text/plain"),
    "encoded": reply(json.dumps(ANSWER).encode(), "application/json", content_encoding="br"),
    "a stream": stream(*EVENTS, DONE),
    "bad framing": raw(chunked("application/json", b"zz\r\n{}\r\n0\r\n\r\n")),
}
STREAM_ONLY: dict[str, Script] = {
    "json": reply(json.dumps(ANSWER).encode()),
    "encoded": reply(WHOLE, SSE, content_encoding="gzip"),
    "empty body": reply(b"", SSE),
    "done without data": reply(DONE, SSE),
    "html": reply(HTML + b"\n\n", SSE),
    "no json": reply(b"data: hello\n\n" + DONE, SSE),
    "bad utf-8": reply(b'data: {"choices":[{"x":"\xff"}]}\n\n' + DONE, SSE),
    "json of another shape": reply(b'data: {"object":"list"}\n\n' + DONE, SSE),
    "bad framing": raw(chunked(SSE, b"zz\r\n" + EVENTS[0] + b"\r\n0\r\n\r\n")),
}


async def test_invalid_whole_answers_are_replaced_or_a_502(cluster: Cluster) -> None:
    for name, script in {**EITHER, **WHOLE_ONLY}.items():
        await check(cluster, CHAT, name, script)


async def test_invalid_streams_are_replaced_or_a_502(cluster: Cluster) -> None:
    for name, script in {**EITHER, **STREAM_ONLY}.items():
        await check(cluster, STREAM, name, script)


async def check(cluster: Cluster, request: Any, name: str, script: Script) -> None:
    """`name` is also the model, so that each case has its own workers."""
    body = {**request, "model": name}
    bad = await cluster.worker(script, name)
    async with cluster.post(body) as response:
        error = (await response.json())["error"]
        # A body without its end cannot be distinguished from a lost worker, which is worth a retry.
        assert (response.status, error["code"]) in ((502, "bad_worker_answer"), (503, "worker_lost")), name
        assert response.headers["content-type"] == "application/json"
        assert set(error) == {"message", "type", "param", "code"}
        assert "It works" not in error["message"]
    assert len(bad.requests) == 1
    cluster.controller.add(bad.address, name)  # as after a heartbeat
    await cluster.worker(answer_well, name)
    assert (await ask(cluster, body))[0] == 200, name
    await cluster.all_released()
    assert len(bad.requests) == 2, name
    assert len(cluster.controller.failed) == 2, name
    cluster.controller.failed.clear()


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"<html>\n\n", id="html"),
        pytest.param(b'data: {"choices":[{"index":0\n\n', id="half json"),
        pytest.param(b'data: {"choices":[{"x":"\xff"}]}\n\n', id="bad utf-8"),
        pytest.param(b'data: {"object":"list"}\n\n', id="json of another shape"),
        pytest.param(b'data: {"error":"x"}\n\n', id="an error of another shape"),
    ],
)
async def test_garbage_after_data_ends_the_stream_with_one_error_event(cluster: Cluster, rest: bytes) -> None:
    await cluster.worker(stream(EVENTS[0], rest, EVENTS[1], DONE, delay_s=0.02))
    other = await cluster.worker(answer_well)
    status, body = await ask(cluster, STREAM)
    assert status == 200
    assert body.startswith(EVENTS[0] + b'data: {"error"')
    assert body.count(b'"error"') == 1
    assert error_event(body)["code"] == "bad_worker_answer"
    assert not other.requests
    await cluster.all_released()
    assert len(cluster.controller.failed) == 1


async def test_bad_framing_after_data_ends_the_stream_with_one_error_event(cluster: Cluster) -> None:
    async def script(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(chunked(SSE, b"%x\r\n%b\r\n" % (len(EVENTS[0]), EVENTS[0])))
        await asyncio.sleep(0.05)
        request.transport.write(b"this is no chunk\r\n")
        await asyncio.sleep(60)
        return web.Response()

    await cluster.worker(script)
    status, body = await asyncio.wait_for(ask(cluster, STREAM), 5)
    assert status == 200
    assert body.startswith(EVENTS[0] + b'data: {"error"')
    assert error_event(body)["code"] in ("bad_worker_answer", "worker_lost")


async def test_done_ends_the_stream_though_the_worker_goes_on(cluster: Cluster) -> None:
    await cluster.worker(stream(*EVENTS, DONE, EVENTS[0], then="hang"))
    assert await asyncio.wait_for(ask(cluster, STREAM), 5) == (200, WHOLE)
    await cluster.all_released()
    assert not cluster.controller.failed


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_interim_answers_come_before_the_answer(cluster: Cluster, body: Any) -> None:
    answer = json.dumps(ANSWER).encode()
    kind, content = ("application/json", answer) if body is CHAT else (SSE, WHOLE)
    head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
    framed = chunked(kind, b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content))
    await cluster.worker(raw(head + framed))
    assert await ask(cluster, body) == (200, content)


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_interim_answers_without_end_are_no_answer(cluster: Cluster, body: Any) -> None:
    async def script(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        while True:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 20)
            await asyncio.sleep(0.01)

    worker = await cluster.worker(script)
    async with asyncio.timeout(5), cluster.post(body) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (502, "bad_worker_answer")
    await until(lambda: bool(worker.aborted_at))


@pytest.mark.parametrize("delay_s", [0.0, 0.1], ids=["at once", "a moment later"])
async def test_an_answer_that_nobody_asked_for_is_nobodys(cluster: Cluster, delay_s: float) -> None:
    """A second answer follows the first on a kept connection: the next request must not get it."""
    first, stray = (json.dumps({**ANSWER, "id": name}).encode() for name in ("first", "stray"))
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"

    async def script(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(whole % (len(first), first))
        if delay_s:
            await asyncio.sleep(delay_s)
        request.transport.write(whole % (len(stray), stray))
        await asyncio.sleep(60)
        return web.Response()

    worker = await cluster.worker(script)
    assert await ask(cluster) == (200, first)
    worker.script = reply(first)
    await asyncio.sleep(3 * delay_s)
    for _ in range(3):
        assert await ask(cluster) == (200, first)


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nx: ", b"a", id="headers"),
        pytest.param(chunked(SSE, b""), b"1\r\nx\r\n", id="an event"),
        pytest.param(HEAD.replace(b"200 OK", b"500 No") % b"application/json", b"1\r\n \r\n", id="an error"),
    ],
)
async def test_bytes_one_by_one_that_make_nothing_whole_are_silence(begin: bytes, piece: bytes) -> None:
    async def script(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(begin)
        while True:
            request.transport.write(piece)
            await asyncio.sleep(0.05)

    async with start_cluster(worker_timeout_s=0.5) as cluster:
        await cluster.worker(script)
        async with asyncio.timeout(10), cluster.post(STREAM) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (504, "worker_timeout")
            assert response.headers["retry-after"]
        await cluster.all_released()
        assert cluster.controller.failed


async def test_an_invalid_retry_after_is_replaced(cluster: Cluster) -> None:
    full = json.dumps({"error": {"message": "full", "type": "overloaded_error"}}).encode()
    worker = await cluster.worker(reply(full, status=429, retry_after="soon"))
    for script in (worker.script, reply(full, status=503), reply(full, status=429, retry_after="9" * 50)):
        worker.script = script
        async with cluster.post() as response:
            assert response.headers["retry-after"] == "1"


# ---- size -------------------------------------------------------------------------------------------------------

MB = 2**20


@pytest.mark.parametrize(
    ("body", "script"),
    [
        pytest.param(CHAT, pieces("application/json", b" " * MB, 50), id="whole, endless"),
        pytest.param(CHAT, reply(b" " * 50 * MB), id="whole, announced"),
        pytest.param(CHAT, reply(b'{"error":{"message":"' + b"x" * MB + b'"}}', status=400), id="a long error"),
        pytest.param(STREAM, pieces(SSE, b"x" * MB, 50), id="a line without end"),
        pytest.param(STREAM, pieces(SSE, b": " + b"x" * MB + b"\n\n", 50), id="long comments"),
        pytest.param(STREAM, pieces(SSE, b": x\n\n" * 10_000, 1000), id="endless comments"),
    ],
)
async def test_an_answer_beyond_its_bound_is_refused_before_it_is_held(body: Any, script: Script) -> None:
    bounds: dict[str, Any] = {"max_answer_bytes": 4 * MB, "max_event_bytes": 2 * MB, "max_stream_bytes": 40 * MB}
    async with start_cluster(**bounds) as cluster:
        await cluster.worker(script)
        before = psutil.Process().memory_info().rss
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*(ask(cluster, body) for _ in range(4)))
        assert psutil.Process().memory_info().rss - before < 200 * MB
        for status, answer in answers:
            if status == 200:  # the stream had already begun
                assert error_event(answer)["code"] == "bad_worker_answer"
            else:
                # Four at a time may exceed the memory for all answers, which is the server's own shortage.
                error = json.loads(answer)["error"]
                assert (status, error["code"]) in ((502, "bad_worker_answer"), (503, "server_out_of_resources"))
        await cluster.all_released()
        assert cluster.controller.failed


async def test_an_endless_stream_of_data_is_cut_at_its_bound() -> None:
    async with start_cluster(max_stream_bytes=MB) as cluster:
        await cluster.worker(pieces(SSE, EVENTS[0] * 100, 10_000))
        status, body = await ask(cluster, STREAM)
        assert status == 200
        assert len(body) < MB + 2000
        assert error_event(body)["code"] == "bad_worker_answer"


async def test_long_answers_within_the_bounds_pass(cluster: Cluster) -> None:
    long_text = "x" * 3_000_000
    event = b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": long_text}}]}).encode() + b"\n\n"
    worker = await cluster.worker(stream(event, DONE))
    assert await ask(cluster, STREAM) == (200, event + DONE)
    answer = json.dumps({**ANSWER, "model": MODEL, "extra": "y" * 20_000_000}).encode()
    worker.script = reply(answer)
    assert await ask(cluster) == (200, answer)
