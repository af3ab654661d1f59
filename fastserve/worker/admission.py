"""Who may generate now: a semaphore, a bounded queue behind it, and 429 past that.

A permit belongs to one client request, all its choices together. It lives inside `async with`, so it ends with the
stream whatever ends the stream.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastserve.errors import OverloadedError

_THROUGHPUT_WINDOW_S = 30.0
_MOST_RETRY_AFTER_S = 60.0


class Admission:
    def __init__(self, limit: int, queue_size: int, clock: Callable[[], float]) -> None:
        """`limit` requests run at once, `queue_size` wait in order of arrival; `clock` tells seconds."""
        self.limit = limit
        self.queue_size = queue_size
        self._clock = clock
        self._semaphore = asyncio.Semaphore(limit)
        self._running = 0
        self._waiting = 0
        self._leases: Counter[str] = Counter()
        self._ended: deque[float] = deque(maxlen=256)

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def leases(self) -> list[str]:
        """Lease ids of the requests that run or wait."""
        return list(self._leases)

    @asynccontextmanager
    async def permit(self, lease: str | None = None) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Raises OverloadedError at once when the queue is full."""
        if self._semaphore.locked() and self._waiting >= self.queue_size:
            raise OverloadedError(
                f"This worker is busy: {self._running} requests run and {self._waiting} wait (--queue-size). "
                "Try again later.",
                retry_after_s=self._retry_after_s(),
            )
        if lease is not None:
            self._leases[lease] += 1
        try:
            self._waiting += 1
            try:
                await self._semaphore.acquire()
            finally:
                self._waiting -= 1
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1
                self._semaphore.release()
                self._ended.append(self._clock())
        finally:
            if lease is not None:
                self._leases[lease] -= 1
                if not self._leases[lease]:
                    del self._leases[lease]

    def _retry_after_s(self) -> float:
        """When the queue should have moved on by its own length, going by the requests that ended lately."""
        now = self._clock()
        recent = [at for at in self._ended if now - at <= _THROUGHPUT_WINDOW_S]
        if not recent:
            return 1.0
        per_s = len(recent) / max(now - recent[0], 1.0)
        return min(_MOST_RETRY_AFTER_S, max(1.0, self._waiting / per_s))
