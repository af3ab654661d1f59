"""The body of a worker's answer, with a periodic check of its connection.

When a body violates HTTP's framing, aiohttp closes the connection but does not always wake the reader. `AnswerBody`
notices that within a second. It also ends a body whose bytes trickle in without completing an event.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType

import aiohttp

CHECK_INTERVAL_S = 1.0


class AnswerBody:
    """Use it as a context manager; the check runs within the block."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        on_broken: Callable[[], None],
        on_silent: Callable[[], None],
        silence_s: float = math.inf,
    ) -> None:
        """While `read` waits, `on_broken` is called if the connection has been closed, and `on_silent` if
        `note_progress` was not called for `silence_s`. They have to cancel the wait.
        """
        self._response = response
        self._content = response.content
        self._on_broken = on_broken
        self._on_silent = on_silent
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._waiting_since = math.inf
        self._progress_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> AnswerBody:
        self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check_connection)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def read(self) -> bytes:
        """The next bytes, at least one; b"" at the end of the body. Raises aiohttp's errors."""
        self._waiting_since = self._loop.time()
        try:
            return await self._content.readany()
        finally:
            self._waiting_since = math.inf

    def note_progress(self) -> None:
        """Note that the bytes read so far were useful."""
        self._progress_at = self._loop.time()

    def _check_connection(self) -> None:
        connection, now = self._response.connection, self._loop.time()
        is_closed = connection is not None and connection.transport is None
        is_waiting = self._waiting_since <= now
        if is_closed and now - self._waiting_since >= CHECK_INTERVAL_S / 2:
            self._on_broken()
        elif is_waiting and now - self._progress_at > self._silence_s:
            self._on_silent()
        else:
            self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check_connection)
