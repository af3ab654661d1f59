"""Shutdown: running requests may finish, incomplete ones end at once, and the rest gets an error."""

from __future__ import annotations

import json
import signal
import time

import pytest

from tests.serving.wire import Service, StartService, Wire, parse_replies

STREAM = b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"


def unchunk(data: bytes) -> bytes:
    """The body of a chunked answer; fails if its end is missing."""
    _, _, rest = data.partition(b"\r\n\r\n")
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert rest == b"\r\n"
            return body
        body += rest[:length]
        rest = rest[length + 2 :]


def begin_stream(service: Service, request: bytes = STREAM) -> tuple[Wire, bytes]:
    wire = service.wire()
    wire.send(request)
    return wire, wire.read_until(b"data: 1")


def wait_ended(service: Service, timeout_s: float) -> float:
    began = time.monotonic()
    service.process.wait(timeout_s)
    return time.monotonic() - began


def test_at_the_end_of_a_drain_every_client_gets_a_last_word(start_service: StartService) -> None:
    service = start_service("--drain-timeout-s", "1")
    stream, begun = begin_stream(service)
    other, other_begun = begin_stream(service, STREAM.replace(b"/stream", b"/stream?kind=binary"))
    waiting = service.wire()
    waiting.send(b"GET /sleep?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    late = service.wire()
    late.send(b"GET /sleep?seconds=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(0.3)  # all four are being answered
    service.process.send_signal(signal.SIGTERM)
    *_, error_event, done, rest = unchunk(begun + stream.read_to_end()).split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    error = json.loads(error_event.removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "server_shutting_down")
    reply = waiting.last_reply()
    assert (reply.status, reply.error["code"]) == (503, "server_shutting_down")
    assert int(reply.headers["retry-after"]) >= 1
    assert late.last_reply().body == b'{"slept":1.0}', "what ends within the time is not disturbed"
    assert b"0\r\n\r\n" not in other_begun + other.read_to_end(), "what cannot carry an error does not look complete"
    assert wait_ended(service, 5) < 5
    assert service.process.returncode == 0
    assert service.process.stdout is not None
    assert service.process.stdout.read().count("stream closed") == 2
    assert "Traceback" not in service.log


def test_half_sent_requests_and_idle_connections_do_not_hold_up_a_drain(start_service: StartService) -> None:
    service = start_service("--drain-timeout-s", "30")
    idle, silent, head, body = (service.wire() for _ in range(4))
    idle.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    idle.read_until(b"}")
    head.send(b"GET /health HTT")
    body.send(b"POST /size HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nhalf")
    time.sleep(0.2)
    service.process.send_signal(signal.SIGTERM)
    assert wait_ended(service, 10) < 5
    [reply] = parse_replies(body.read_to_end())
    assert (reply.status, reply.error["code"]) == (503, "server_shutting_down")
    assert idle.is_closed()
    assert silent.is_closed()
    assert head.is_closed()


def test_a_client_that_does_not_read_does_not_hold_up_the_end(start_service: StartService) -> None:
    service = start_service("--drain-timeout-s", "0.5")
    with service.wire() as wire:
        wire.send(b"GET /stream?piece=100000&pause_s=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.5)
        service.process.send_signal(signal.SIGTERM)
        assert wait_ended(service, 10) < 5
    assert service.process.returncode == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(start_service: StartService, second: signal.Signals) -> None:
    service = start_service("--drain-timeout-s", "30")
    stream, begun = begin_stream(service)
    service.process.send_signal(signal.SIGTERM)
    stream.read_until(b"data: ")
    service.process.send_signal(second)
    assert wait_ended(service, 10) < 2
    assert b"server_shutting_down" in begun + stream.read_to_end()


def test_a_second_signal_ends_a_process_that_hangs(start_service: StartService) -> None:
    service = start_service()
    with service.wire() as wire:
        wire.send(b"GET /block HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.3)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        service.process.send_signal(signal.SIGTERM)
        assert wait_ended(service, 10) < 3
