"""Middleware that bounds bodies and memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

import psutil
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.errors import BodyTooLargeError, ShortageError, UnsupportedEncodingError
from fastserve.host_memory import MemoryBound, memory_bounds
from fastserve.observability.text import printable
from fastserve.serving.errors import error_response
from fastserve.serving.pacing import BytePacer

logger = logging.getLogger(__name__)

ALWAYS_SERVED = frozenset({"/health", "/metrics"})
"""Paths that are answered even when memory is short, for monitoring."""
SAMPLE_INTERVAL_S = 0.25
UNPACED_BYTES = 65_536
"""Bytes of each body that are read without pacing."""
BURST_S = 0.125
"""Size of a burst after a pause: bytes at the full rate for this many seconds."""


class BodyBounds:
    """Bounds the body of each request, and the sum of all bodies, when the application reads them.

    An unread body costs nothing, so keys and routes are checked first. A refused body raises from `receive`, before it
    is read if Content-Length shows its size, and is answered like any error of the application: BodyTooLargeError,
    UnsupportedEncodingError, ShortageError. Bytes count from their arrival until their request has ended. Announced
    bytes do not count, or a few clients that send nothing could use up the bound.

    Reading bodies takes time of the event loop that other requests wait for. So the bytes of all bodies beyond their
    first UNPACED_BYTES are read at `max_long_bytes_per_s` at most, all requests together.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_buffered_bytes: int,
        max_long_bytes_per_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_buffered_bytes = max_buffered_bytes
        self._num_buffered_bytes = 0
        self._pacer = BytePacer(max_long_bytes_per_s, round(max_long_bytes_per_s * BURST_S), clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._max_body_bytes
        num_bytes = 0
        is_checked = False

        def check_room(more: int) -> None:
            if num_bytes + more > max_bytes:
                raise BodyTooLargeError(f"The body of the request is larger than the maximum of {max_bytes} bytes.")
            if self._num_buffered_bytes + more > self._max_buffered_bytes:
                raise ShortageError(
                    "The server holds as many bytes of request bodies as allowed; try again in a moment."
                )

        async def bounded_receive() -> Message:
            nonlocal num_bytes, is_checked
            if not is_checked:
                is_checked = True
                check_room(_announced_bytes(scope))
            message = await receive()
            if body := message.get("body"):
                check_room(len(body))
                num_bytes += len(body)
                self._num_buffered_bytes += len(body)
                num_paced = min(len(body), num_bytes - UNPACED_BYTES)
                if num_paced > 0 and (wait_s := self._pacer.take(num_paced)) > 0:
                    await asyncio.sleep(wait_s)
            return message

        try:
            await self._app(scope, bounded_receive, send)
        finally:
            self._num_buffered_bytes -= num_bytes


def _announced_bytes(scope: Scope) -> int:
    """Content-Length, or 0 without one. Raises UnsupportedEncodingError for a compressed body."""
    announced = 0
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            announced = int(value)
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            encoding = printable(value.decode("latin-1"), 40)
            raise UnsupportedEncodingError(
                f"The body has the content encoding '{encoding}', which is not supported: send it as it is."
            )
    return announced


class MemoryGuard:
    """Refuses new requests while memory is nearly used up, so that running ones can finish.

    `vital_paths` and ALWAYS_SERVED are served nevertheless.
    """

    def __init__(self, app: ASGIApp, meter: MemoryMeter, vital_paths: Collection[str]) -> None:
        self._app = app
        self._meter = meter
        self._served = ALWAYS_SERVED.union(vital_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._meter.is_high() and scope["path"] not in self._served:
            error = ShortageError("The server is short of memory and takes no new requests; try again in a moment.")
            await error_response(error, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class MemoryMeter:
    """Checks whether memory use is above a mark, at most once every SAMPLE_INTERVAL_S."""

    def __init__(
        self,
        high_mark: float,
        clock: Callable[[], float],
        bounds: Callable[[], list[MemoryBound]] = memory_bounds,
    ) -> None:
        """`high_mark`: up to 1 a share of each memory limit, above 1 bytes of this process. `clock`: in seconds."""
        self._high_mark = high_mark
        self._clock = clock
        self._bounds = bounds
        self._process = psutil.Process()
        self._sampled_at = -SAMPLE_INTERVAL_S
        self._is_high = False

    def is_high(self) -> bool:
        now = self._clock()
        if now - self._sampled_at >= SAMPLE_INTERVAL_S:
            self._sampled_at = now
            self._sample()
        return self._is_high

    def _sample(self) -> None:
        try:
            problem = self._problem()
        except OSError:
            return  # no file descriptor is free: keep the last result
        if (problem is not None) == self._is_high:
            return
        self._is_high = problem is not None
        if problem is not None:
            logger.warning("new requests are refused for want of memory: %s", problem)
        else:
            logger.info("there is memory again; new requests are taken")

    def _problem(self) -> str | None:
        if self._high_mark > 1:
            used = self._process.memory_info().rss
            return f"this process uses {used / 1e6:.0f} MB" if used > self._high_mark else None
        for bound in self._bounds():
            if bound.limit_bytes > 0 and 1 - bound.free_bytes / bound.limit_bytes > self._high_mark:
                return f"{max(0, bound.free_bytes) / 1e6:.0f} MB are left {bound.where}"
        return None
