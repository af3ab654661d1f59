"""Bodies that are too large, too many, compressed or not read."""

from __future__ import annotations

import json
import time

import aiohttp
import pytest

from fastserve.errors import InvalidRequestError
from fastserve.serving.json_bounds import check_json_depth
from tests.serving.wire import Service, StartService, wait_until

POST = b"POST /size HTTP/1.1\r\nHost: localhost\r\n"


def test_a_body_up_to_the_limit_is_read(impatient: Service) -> None:
    assert json.loads(impatient.ask("/size", "POST", b"x" * 100_000).body) == {"size": 100_000}


def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(impatient: Service) -> None:
    with impatient.wire() as wire:
        wire.send(POST + b"Content-Length: 100001\r\n\r\n")
        reply = wire.next_reply()
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert "100000 bytes" in reply.error["message"]


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_client_that_sends_all_before_it_reads_gets_its_413(impatient: Service, connection: str) -> None:
    with impatient.wire() as wire:
        wire.send(POST + b"Connection: %s\r\nContent-Length: 20000000\r\n\r\n" % connection.encode())
        wire.send(b"x" * 20_000_000)
        assert b" 413 " in wire.read_until(b"}")


def test_a_connection_goes_on_after_a_413_whose_body_came_whole(impatient: Service) -> None:
    with impatient.wire() as wire:
        wire.send(POST + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000)
        assert b" 413 " in wire.read_until(b'"code":40001}')
        wire.send(POST + b"Content-Length: 3\r\n\r\nabc")
        assert b'{"size":3}' in wire.read_until(b"}")


def test_a_chunked_body_is_counted_while_it_is_read(impatient: Service) -> None:
    with impatient.wire() as wire:
        wire.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        for _ in range(10):
            wire.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert wire.next_reply().status == 413


def test_an_endless_body_that_nobody_reads_is_not_kept(impatient: Service) -> None:
    before = impatient.rss_mb()
    with impatient.wire() as wire:
        wire.send(b"POST /unread HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\n")
        began = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012 - it is one flood
            while time.monotonic() - began < 8:
                wire.send(b"x" * 100_000)
    assert impatient.rss_mb() - before < 10


@pytest.mark.parametrize("path", ["/size", "/unread"])
def test_idle_connections_keep_nothing_of_their_bodies(start_service: StartService, path: str) -> None:
    service = start_service()
    wires = [service.wire() for _ in range(400)]
    for size in (1, 60_000):
        before = service.rss_mb()
        for wire in wires:
            body = b"Content-Length: %d\r\n\r\n" % size + b"x" * size
            wire.send(POST.replace(b"/size", path.encode()) + body)
            assert wire.next_reply().status == 200
    grown = service.rss_mb() - before
    for wire in wires:
        wire.socket.close()
    assert grown < 8


def test_the_sum_of_all_bodies_is_bounded_and_becomes_free_again(impatient: Service) -> None:
    hold = b"POST /hold HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
    with impatient.wire() as first, impatient.wire() as second:
        for wire in (first, second):
            wire.send(hold)
        wait_until(
            lambda: impatient.ask("/size", "POST", b"x" * 60_000).status == 503, "two large bodies fill the room"
        )
        reply = impatient.ask("/size", "POST", b"x" * 60_000)
        assert reply.error["code"] == "server_overloaded"
        assert int(reply.headers["retry-after"]) >= 1
        assert impatient.ask("/size", "POST", b"x" * 1000).status == 200, "small ones still fit"
    wait_until(lambda: impatient.ask("/size", "POST", b"x" * 60_000).status == 200, "there is room again")


def test_bodies_that_are_announced_and_do_not_come_take_no_room(start_service: StartService) -> None:
    service = start_service("--max-body-bytes", "100000", "--max-buffered-bytes", "250000")
    wires = [service.wire() for _ in range(20)]
    for wire in wires:
        wire.send(POST + b"Content-Length: 100000\r\n\r\n{")
    for _ in range(20):
        assert service.ask("/size", "POST", b"x" * 100_000).status == 200
    for wire in wires:
        wire.socket.close()


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br, gzip", 415), ("identity", 200)])
def test_compressed_bodies_are_refused(impatient: Service, encoding: str, status: int) -> None:
    reply = impatient.ask("/size", "POST", b"xyz", f"Content-Encoding: {encoding}\r\n")
    assert reply.status == status
    if status == 415:
        assert encoding in reply.error["message"]


async def test_an_http_client_sees_the_413(impatient: Service) -> None:
    async with aiohttp.ClientSession() as http:
        for _ in range(3):
            async with http.post(f"http://127.0.0.1:{impatient.port}/size", data=b"x" * 3_000_000) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == "request_too_large"


# ---- depth of JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "depth"),
    [
        (b"1", 0),
        (b"[]", 1),
        (b'{"a": [1, {"b": []}]}', 4),
        (b"[" * 5 + b"]" * 5 + b"", 5),
        (b'["[[[[{{{{", "\\"[[[[", "\\\\", {"\\\\\\"[": "]"}]', 2),
        (b'{"a\\\\": {"b\\\\\\\\": [{}]}}', 4),
        (b"[[],[[]],[[],[[]]]]", 4),
        (b'["\\u005b\\u005b[["]', 1),
        ("[\"€[[\", ['[']]".encode(), 3),
    ],
)
def test_depth_is_that_of_arrays_and_objects_outside_strings(body: bytes, depth: int) -> None:
    check_json_depth(body, depth)
    with pytest.raises(InvalidRequestError, match=f"deeper than {depth - 1} levels"):
        check_json_depth(body, depth - 1)


@pytest.mark.parametrize("body", [b"[" * 3_000_000, b'{"a":' * 500_000, b"[[]," * 1_000_000])
def test_deep_bodies_are_refused_whatever_their_size(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        check_json_depth(body, 64)
