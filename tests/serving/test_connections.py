"""Slow, endless, too many or invalid connections: each ends with an answer and affects no other client."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import cast

import psutil
import pytest

from fastserve.serving.connection import (
    FULL_LOG_INTERVAL_S,
    MAX_SWEPT_AT_ONCE,
    SWEEP_INTERVAL_S,
    ConnectionLimits,
    ConnectionTable,
    client_address,
)
from tests.serving.wire import Service, StartService, Wire, parse_replies, wait_until

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /size HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def wire(impatient: Service) -> Iterator[Wire]:
    with impatient.wire() as wire:
        yield wire


# ---- deadlines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [b"G", b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\r\n"])
def test_headers_that_do_not_end_are_answered_with_408(wire: Wire, begin: bytes) -> None:
    wire.send(begin)
    reply = wire.last_reply()
    assert reply.status == 408
    assert "headers" in reply.error["message"]
    assert reply.headers["connection"] == "close"


def test_headers_that_drip_are_answered_with_408(wire: Wire) -> None:
    wire.send(b"GET /health HTTP/1.1\r\n")
    began = time.monotonic()
    with pytest.raises((ConnectionError, AssertionError)):  # noqa: PT012 - it is one exchange
        for number in range(100):
            wire.send(b"X-%d: y\r\n" % number)
            wire.socket.settimeout(0.1)
            try:
                data = wire.socket.recv(4096)
            except TimeoutError:
                continue
            assert b" 408 " not in data
            raise ConnectionError
    assert time.monotonic() - began < 5


def test_a_silent_connection_is_closed(wire: Wire) -> None:
    assert wire.is_closed(5)


@pytest.mark.parametrize("body", [b"Content-Length: 1000\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhe"])
def test_a_body_that_does_not_end_is_answered_with_408(wire: Wire, body: bytes) -> None:
    wire.send(POST + body)
    reply = wire.last_reply()
    assert reply.status == 408
    assert "body" in reply.error["message"]


def test_an_idle_connection_is_closed_after_its_answer(wire: Wire) -> None:
    wire.send(GET)
    wire.read_until(b"}")
    assert wire.is_closed(5)


def test_the_deadline_of_headers_holds_for_a_second_request_too(wire: Wire) -> None:
    wire.send(GET)
    wire.read_until(b"}")
    wire.send(b"GET /health")
    assert wire.last_reply().status == 408


def test_half_a_next_request_does_not_end_a_long_answer(wire: Wire) -> None:
    wire.send(b"GET /stream?count=60&pause_s=0.02 HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"GET /hea")
    data = wire.read_until(b"data: [DONE]")
    assert data.count(b"data: ") == 61
    # The deadline of the next one starts now.
    assert b" 408 " in wire.read_to_end()


def test_a_client_that_does_not_read_is_cut_off(impatient: Service) -> None:
    with impatient.wire() as stalled, impatient.wire() as reading:
        stalled.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for wire in (stalled, reading):
            wire.send(b"GET /stream?piece=50000&pause_s=0&count=300 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        before = impatient.rss_mb()
        assert reading.read_until(b"[DONE]").count(b"data: ") > 0
        assert impatient.rss_mb() - before < 50, "the answer is not piled up"
        assert impatient.process.stdout is not None
        for _ in range(2):
            assert impatient.process.stdout.readline() == "stream closed\n"


def test_an_answer_that_is_never_read_does_not_keep_its_connection(start_service: StartService) -> None:
    service = start_service("--write-timeout-s", "1", "--keep-alive-timeout-s", "1")
    with service.wire() as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        # Less than the limit of its buffers: the answer is written completely.
        wire.send(b"GET /stream?count=8&piece=50000&pause_s=0 HTTP/1.0\r\n\r\n")
        wait_until(lambda: service.num_connections() == 1, "the connection is there")
        wait_until(lambda: service.num_connections() == 0, "the connection is gone", 8)


# ---- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000,
        b"GET / HTTP/1.1\r\n" + b"a" * 40_000,
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 900) for n in range(90)) + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + b"\r\n",
        CHUNKED + b"3;" + b"x" * 40_000,
        CHUNKED + b"1;x=" + b"y" * 2000 + b"\r\na\r\n" + (b"1;x=" + b"y" * 2000 + b"\r\na\r\n") * 20,
        CHUNKED + b"0\r\n" + b"X-Trailer: y\r\n" * 200,
        CHUNKED + b"0\r\nX-Trailer: " + b"y" * 40_000,
    ],
    ids=[
        "url", "value", "name", "sum", "lines", "chunk extension", "chunk extensions", "trailers", "long trailer",
    ],
)  # fmt: skip
@pytest.mark.parametrize("step", [1000, 1_000_000])
def test_headers_and_framing_without_end_are_answered_with_431(impatient: Service, head: bytes, step: int) -> None:
    with impatient.wire() as wire:
        try:
            for start in range(0, len(head), step):
                wire.send(head[start : start + step])
        except ConnectionError:
            pass
        reply = wire.last_reply()
    assert reply.status == 431
    assert reply.error["code"] == "headers_too_large"


def test_a_flood_of_headers_is_not_kept(impatient: Service) -> None:
    before = impatient.rss_mb()
    with impatient.wire() as wire:
        wire.send(b"GET / HTTP/1.1\r\n")
        with suppress(ConnectionError):
            for number in range(1000):
                wire.send(b"X-%d: %s\r\n" % (number, b"y" * 60_000))
            assert wire.last_reply().status == 431
    assert impatient.rss_mb() - before < 20
    assert impatient.ask().status == 200


def test_a_body_in_small_chunks_is_read(impatient: Service) -> None:
    """Chunks of 16 bytes are legitimate, although framing is a third of the input."""
    with impatient.wire() as wire:
        wire.send(CHUNKED + b"10\r\n0123456789abcdef\r\n" * 5000 + b"0\r\n\r\n")
        assert b'{"size":80000}' in wire.read_until(b"}")


def test_trailers_do_not_become_headers(impatient: Service) -> None:
    with impatient.wire() as wire:
        wire.send(CHUNKED + b"1\r\na\r\n0\r\nContent-Encoding: gzip\r\n\r\n")
        assert b'{"size":1}' in wire.read_until(b"}")


# ---- protocol ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\nabc",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1e3\r\n\r\n",
        CHUNKED + b"zz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    ],
)
def test_what_is_no_request_is_answered_with_400_in_openais_shape(impatient: Service, request_bytes: bytes) -> None:
    with impatient.wire() as wire:
        wire.send(request_bytes)
        reply = wire.last_reply()
    assert reply.status == 400
    assert reply.error["code"] == "invalid_http"


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    paths = [b"/things/%d" % number for number in range(10)]
    wire.send(b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in paths))
    replies = parse_replies(wire.read_until(b'"9"}'))
    assert [reply.body for reply in replies] == [b'{"name":"%d"}' % number for number in range(10)]


def test_a_client_that_leaves_is_noticed_although_it_has_pipelined(start_service: StartService) -> None:
    service = start_service()
    with service.wire() as wire:
        wire.send(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n" + GET)
        wire.read_until(b"data: 2")
    assert service.process.stdout is not None
    assert service.process.stdout.readline() == "stream closed\n"
    assert service.ask().status == 200
    assert "Traceback" not in service.log


def test_a_flood_of_pipelined_requests_is_cut(impatient: Service) -> None:
    before = impatient.rss_mb()
    with impatient.wire() as wire:
        wire.send(b"GET /sleep?seconds=5 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with pytest.raises(ConnectionError):  # noqa: PT012 - it is one flood
            for _ in range(1000):
                wire.send(GET * 1000)
            wire.read_to_end()
    assert impatient.rss_mb() - before < 20
    assert impatient.ask().status == 200


def test_http_1_0_is_answered_and_closed(wire: Wire) -> None:
    wire.send(b"GET /health HTTP/1.0\r\n\r\n")
    assert wire.last_reply().body == b'{"status":"ok"}'


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_an_upgrade_is_answered_as_if_none_was_asked_for(wire: Wire, protocol: bytes) -> None:
    upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n" % protocol
    for request in (upgrade, GET, upgrade, GET + upgrade):
        wire.send(request)
        assert wire.next_reply().body == b'{"status":"ok"}'


@pytest.mark.parametrize("step", [1, 10, 1000])
def test_a_body_is_read_beside_an_upgrade(wire: Wire, step: int) -> None:
    """Java's client sends each first request so."""
    head = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    for body in (b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"):
        data = POST + head + body
        for start in range(0, len(data), step):
            wire.send(data[start : start + step])
        assert wire.next_reply().body == b'{"size":3}'


def test_a_flood_of_upgrades_is_cut(impatient: Service) -> None:
    upgrade = b"GET /sleep?seconds=1 HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with impatient.wire() as wire, suppress(ConnectionError):
        wire.send(upgrade * 5000)
        wire.read_to_end()
    assert impatient.ask().status == 200
    assert "Traceback" not in impatient.log


def test_connect_is_refused(wire: Wire) -> None:
    wire.send(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n")
    assert wire.last_reply().status == 400


def test_expect_100_continue(impatient: Service) -> None:
    with impatient.wire() as wire:
        wire.send(POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        wire.send(b"abc")
        assert b'{"size":3}' in wire.read_until(b"}")
    with impatient.wire() as wire:
        wire.send(POST + b"Content-Length: 300000\r\nExpect: 100-continue\r\n\r\n")
        assert wire.last_reply().status == 413


def test_head_is_answered_like_get_without_a_body(impatient: Service) -> None:
    with impatient.wire() as wire:
        wire.send(GET.replace(b"GET", b"HEAD"))
        head = wire.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"content-length: 15" in head
        wire.send(GET)
        assert parse_replies(wire.read_until(b"}"))[0].body == b'{"status":"ok"}'


# ---- numbers ----------------------------------------------------------------------------------------------------


def test_more_connections_than_allowed_are_refused_and_room_is_found_again(start_service: StartService) -> None:
    service = start_service("--max-connections", "20")
    held = [service.wire() for _ in range(20)]
    for wire in held:
        wire.send(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wire.read_until(b"data: 1")
    for _ in range(30):
        reply = service.ask()
        assert (reply.status, reply.error["code"]) == (503, "server_overloaded")
        assert int(reply.headers["retry-after"]) >= 1
    assert all(wire.read_until(b"data: ") for wire in held), "those that are served notice nothing"
    for wire in held[:3]:
        wire.socket.close()
    wait_until(lambda: service.ask().status == 200, "there is room again")
    for wire in held:
        wire.socket.close()


def test_connections_that_come_and_go_at_the_limit_do_not_flood_the_log(start_service: StartService) -> None:
    service = start_service("--max-connections", "8")
    began = time.monotonic()
    for _ in range(10):
        wires = [service.wire() for _ in range(16)]
        wait_until(lambda: "connections are in use" in service.log, "the limit is reached")
        for wire in wires:
            wire.socket.close()
        wait_until(lambda: service.num_connections() == 0, "all are gone")
    num_lines = service.log.count("connections are in use")
    assert 1 <= num_lines <= 1 + (time.monotonic() - began) / FULL_LOG_INTERVAL_S


def test_connections_of_one_address_are_bounded_but_not_those_of_this_machine(start_service: StartService) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = probe.getsockname()[0]
    service = start_service("--max-connections-per-address", "5")
    # For a server called on its loopback address, any other address is a remote client's.
    held = [service.wire(source=own) for _ in range(5)]
    with service.wire(source=own) as wire:
        wire.send(GET)
        assert "--max-connections-per-address" in wire.last_reply().error["message"]
    many = [service.wire() for _ in range(10)]
    assert service.ask().status == 200
    for other in held + many:
        other.socket.close()
    wait_until(lambda: service.num_connections() == 0, "all are gone")
    with service.wire(source=own) as wire:
        wire.send(GET)
        assert wire.read_until(b"}").startswith(b"HTTP/1.1 200 ")


class FakeSocket:
    def __init__(self, own: str) -> None:
        self._own = own

    def getsockname(self) -> tuple[str, int]:
        return self._own, 80


@pytest.mark.parametrize(
    ("peer", "own", "address"),
    [
        ("127.0.0.1", "127.0.0.1", None),
        ("::1", "::1", None),
        ("192.0.2.7", "192.0.2.7", None),
        ("192.0.2.7", "192.0.2.8", "192.0.2.7"),
        ("2600:1:2:3:4:5:6:7", "2600::1", "2600:1:2:3::/64"),
        ("fd00::7", "fd00::8", "fd00::7"),
    ],
)
def test_whose_connections_count_together(peer: str, own: str, address: str | None) -> None:
    assert client_address((peer, 1234), cast(socket.socket, FakeSocket(own))) == address


def test_connections_never_take_the_last_open_file(start_service: StartService) -> None:
    service = start_service(max_files=120)
    held = []
    for _ in range(200):
        held.append(service.wire())
        held[-1].send(b"GET /sleep?seconds=8 HTTP/1.1\r\nHost: localhost\r\n\r\n")

    def is_refused() -> bool:
        """While many refused connections linger, further ones are closed without an answer."""
        with suppress(ConnectionError, ValueError):
            reply = service.ask()
            return reply.status == 503 and reply.error["code"] == "server_overloaded"
        return False

    wait_until(is_refused, "a new client is refused with an answer")
    for wire in held:
        wire.socket.close()
    wait_until(lambda: service.ask().status == 200, "there is room again")


@pytest.mark.slow
def test_a_process_without_files_neither_dies_nor_spins(start_service: StartService) -> None:
    service = start_service(max_files=200)
    with service.wire() as holder:
        holder.send(b"GET /exhaust?seconds=2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.3)
        process = psutil.Process(service.process.pid)
        before = sum(process.cpu_times()[:2])
        clients = [service.wire() for _ in range(20)]
        for client in clients:
            client.send(GET)
        holder.next_reply()
        assert sum(process.cpu_times()[:2]) - before < 1.0, "half of the time that it had"
        for client in clients:
            client.socket.close()
    wait_until(lambda: service.ask().status == 200, "new clients are served again")


def test_good_clients_are_served_during_an_attack(impatient: Service) -> None:
    """Incomplete heads and bodies, silent clients and floods at once do not affect other clients."""
    attackers = []
    for number in range(200):
        wire = impatient.wire()
        attackers.append(wire)
        wire.send([b"", b"GET /he", POST + b"Content-Length: 99999\r\n\r\nx" * 10, b"G" * 30_000][number % 4])
    for _ in range(40):
        assert impatient.ask("/size", "POST", b"x" * 1000).body == b'{"size":1000}'
    wait_until(lambda: impatient.num_connections() <= 2, "the attackers are gone", 6)
    for wire in attackers:
        wire.socket.close()


class TimerLoop:
    """A fake event loop with a manual clock and one timer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due = math.inf
        self.callback: Callable[[], None] = lambda: None

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.due, self.callback = self.now + delay_s, callback


class Swept:
    address = None
    is_lingering = False

    def __init__(self) -> None:
        self.swept_at: list[float] = []

    def enforce(self, now: float) -> None:
        self.swept_at.append(now)


def test_deadlines_of_thousands_of_connections_are_looked_at_in_parts() -> None:
    loop = TimerLoop()
    limits = ConnectionLimits(10_000, 10_000, 1, 1, 1.0, 1.0, 1.0, 1)
    table = ConnectionTable(limits, loop)  # type: ignore[arg-type]
    connections = [Swept() for _ in range(1100)]
    for connection in connections:
        table.admit(connection)  # type: ignore[arg-type]
    num_swept = 0
    while loop.due <= 3.0:
        loop.now = loop.due
        loop.callback()
        before, num_swept = num_swept, sum(len(connection.swept_at) for connection in connections)
        assert num_swept - before <= MAX_SWEPT_AT_ONCE
    for connection in connections:
        gaps = [after - before for before, after in pairwise([0.0, *connection.swept_at, 3.0])]
        assert max(gaps) < 2.1 * SWEEP_INTERVAL_S


def test_a_connection_that_is_closed_during_a_sweep_is_left_alone() -> None:
    loop = TimerLoop()
    table = ConnectionTable(ConnectionLimits(10_000, 10_000, 1, 1, 1.0, 1.0, 1.0, 1), loop)  # type: ignore[arg-type]
    connections = [Swept() for _ in range(2 * MAX_SWEPT_AT_ONCE)]
    for connection in connections:
        table.admit(connection)  # type: ignore[arg-type]
    loop.callback()
    unswept = [connection for connection in connections if not connection.swept_at]
    assert len(unswept) == MAX_SWEPT_AT_ONCE
    for connection in unswept[1:]:
        table.remove(connection)  # type: ignore[arg-type]
    loop.callback()
    assert [len(connection.swept_at) for connection in unswept] == [1, *[0] * (MAX_SWEPT_AT_ONCE - 1)]
