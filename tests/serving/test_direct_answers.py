"""Bounds and deadlines hold for connections with direct answers."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest

from tests.serving.wire import Service, StartService, Wire, wait_until


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Service:
    return start_service(
        *("--max-body-bytes", "1000", "--head-timeout-s", "0.5", "--body-timeout-s", "0.7"),
        *("--keep-alive-timeout-s", "1"),
    )


@pytest.fixture
def wire(service: Service) -> Iterator[Wire]:
    """A connection with direct answers."""
    with service.wire() as wire:
        assert ask(wire, 1) == {"usual": 1}
        assert ask(wire, 2) == {"direct": 2}
        yield wire


def message(size: int) -> bytes:
    return b"POST /repeated HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size


def ask(wire: Wire, size: int) -> dict[str, int]:
    wire.send(message(size))
    answer: dict[str, int] = json.loads(wire.next_reply().body)
    return answer


def test_a_longer_body_than_the_usual_way_takes_is_refused(wire: Wire) -> None:
    assert ask(wire, 1000) == {"direct": 1000}
    wire.send(message(1001))
    assert wire.next_reply().status == 413


def test_half_a_message_has_its_deadline(wire: Wire) -> None:
    wire.send(message(10)[:30])
    assert wire.last_reply().status == 408
    assert wire.read_to_end() == b""


def test_half_a_body_has_its_deadline(wire: Wire) -> None:
    wire.send(message(10)[:-1])
    assert wire.last_reply().status == 408


def test_an_idle_connection_is_closed(wire: Wire) -> None:
    assert wire.read_to_end() == b""


def test_an_empty_line_after_a_body_starts_no_clock(service: Service) -> None:
    with service.wire() as wire:
        wire.send(message(1))
        time.sleep(0.02)  # in its own segment, while the first message is being answered
        wire.send(b"\r\n")
        assert json.loads(wire.next_reply().body) == {"usual": 1}
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert list(ask(wire, 3).values()) == [3]
            time.sleep(0.05)


def test_they_do_not_hold_up_a_drain(start_service: StartService) -> None:
    service = start_service("--drain-timeout-s", "20")
    with service.wire() as wire:
        ask(wire, 1)
        assert ask(wire, 2) == {"direct": 2}
        service.process.send_signal(signal.SIGTERM)
        assert wire.read_to_end() == b""
    wait_until(lambda: service.process.poll() == 0, "the service ends in order", 5)
