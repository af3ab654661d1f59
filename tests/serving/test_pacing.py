"""Long bodies and dropped bytes take a bounded share of the event loop's time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from fastserve.serving.bounds import BURST_S, UNPACED_BYTES, BodyBounds
from fastserve.serving.connection import MAX_DROPPED_BYTES_PER_S
from fastserve.serving.pacing import BytePacer
from tests.serving.wire import Service

MEBIBYTE = 2**20


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_free_and_then_the_rate_holds() -> None:
    clock = Clock()
    pacer = BytePacer(1000, 500, clock)
    assert pacer.take(500) == 0
    assert pacer.take(100) == pytest.approx(0.1)
    assert pacer.take(200) == pytest.approx(0.3), "behind those that came before"
    clock.now += 0.3
    assert pacer.take(0) == pytest.approx(0)
    clock.now += 1000
    assert [pacer.take(500), pacer.take(1000)] == [0, pytest.approx(1)], "a long pause saves up no more than the burst"


async def read_all(wrapped: BodyBounds, pieces: list[bytes]) -> int:
    """Number of bytes that an application inside `wrapped` reads."""
    num_read = 0
    messages: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": at < len(pieces) - 1} for at, piece in enumerate(pieces)
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_: Message) -> None:
        raise AssertionError("nothing is answered")

    async def application(_: Scope, receive: Receive, __: Send) -> None:
        nonlocal num_read
        more = True
        while more:
            message = await receive()
            num_read += len(message["body"])
            more = message["more_body"]

    wrapped._app = application
    await wrapped({"type": "http", "headers": []}, receive, send)
    return num_read


async def nobody(*_: Any) -> None:
    raise AssertionError


async def test_long_bodies_wait_for_their_turn_and_short_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = Clock()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    rate = MEBIBYTE
    wrapped = BodyBounds(nobody, 100 * MEBIBYTE, 100 * MEBIBYTE, rate, clock)
    began = clock.now
    assert await read_all(wrapped, [b"x" * UNPACED_BYTES] * 65) == 65 * UNPACED_BYTES
    assert sum(slept) == pytest.approx(clock.now - began)
    assert sum(slept) == pytest.approx(64 * UNPACED_BYTES / rate - BURST_S)
    slept.clear()
    for _ in range(100):
        assert await read_all(wrapped, [b"x" * (UNPACED_BYTES // 2)] * 2) == UNPACED_BYTES
    assert slept == [], "they are not what costs"
    # Bytes beyond the first ones count, however they are split.
    assert await read_all(wrapped, [b"x" * (UNPACED_BYTES + rate)]) == UNPACED_BYTES + rate
    assert sum(slept) == pytest.approx(1)


def test_the_rest_of_a_refused_body_is_not_read_faster_than_it_may(impatient: Service) -> None:
    piece = b"x" * MEBIBYTE
    began, num_sent = time.monotonic(), 0
    with impatient.wire() as wire:
        wire.send(b"POST /size HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\n")
        wire.socket.settimeout(1)
        with pytest.raises(OSError):  # noqa: PT012 - it is closed in the end, whoever waits
            while time.monotonic() - began < 8:
                num_sent += wire.socket.send(piece)
    seconds = time.monotonic() - began
    in_buffers = 24 * MEBIBYTE  # in both kernels' socket buffers, and the burst
    assert num_sent < seconds * MAX_DROPPED_BYTES_PER_S + in_buffers
