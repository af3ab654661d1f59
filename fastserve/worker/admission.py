"""Admission control: a semaphore of permits, a bounded queue of requests that wait for one, and 429 beyond that.

A permit covers one client request with all its choices. It is held in an `async with`, so it is released however the
stream ends. Permits are given first come, first served; priorities matter only to the engine's scheduler, among the
requests that hold a permit.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice

from fastserve.errors import OverloadedError
from fastserve.protocol import MAX_LEASES

_THROUGHPUT_WINDOW_S = 30.0
_MAX_RETRY_AFTER_S = 60.0


class Admission:
    def __init__(self, limit: int, queue_size: int, max_queued_tokens: int, clock: Callable[[], float]) -> None:
        """At most `limit` requests run and `queue_size` wait at once. The prompts of those that wait have at most
        `max_queued_tokens` tokens in total, except that a single one may be longer. `clock` returns seconds.
        """
        self.limit = limit
        self.queue_size = queue_size
        self.max_queued_tokens = max_queued_tokens
        self._clock = clock
        self._permits = asyncio.Semaphore(limit)
        self._running = 0
        self._waiting = 0
        self._queued_tokens = 0
        self._leases: Counter[str] = Counter()
        self._ended: deque[float] = deque(maxlen=256)

    @property
    def running(self) -> int:
        """Requests that hold a permit."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests that wait for a permit."""
        return self._waiting

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of the requests that wait."""
        return self._queued_tokens

    @property
    def leases(self) -> list[str]:
        """Lease ids of the requests that run or wait."""
        return list(islice(self._leases, MAX_LEASES))

    @asynccontextmanager
    async def permit(self, lease: str | None = None, num_tokens: int = 0) -> AsyncIterator[None]:
        """Wait for a permit and hold it. `num_tokens`: tokens of the request's prompts.

        Raises OverloadedError if the queue is full.
        """
        if lease is not None:
            self._leases[lease] += 1
        try:
            await self._acquire(num_tokens)
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1
                self._permits.release()
                self._ended.append(self._clock())
        finally:
            if lease is not None:
                self._leases[lease] -= 1
                if not self._leases[lease]:
                    del self._leases[lease]

    async def _acquire(self, num_tokens: int) -> None:
        if self._permits.locked():
            self._check_room(num_tokens)
        self._waiting += 1
        self._queued_tokens += num_tokens
        try:
            await self._permits.acquire()
        finally:
            self._waiting -= 1
            self._queued_tokens -= num_tokens

    def _check_room(self, num_tokens: int) -> None:
        if self._waiting >= self.queue_size:
            limit = f"{self._waiting} wait (--queue-size)"
        elif self._waiting and self._queued_tokens + num_tokens > self.max_queued_tokens:
            limit = f"{self._waiting} wait with {self._queued_tokens} prompt tokens (--max-queued-tokens)"
        else:
            return
        raise OverloadedError(
            f"This worker is busy: {self._running} requests run and {limit}. Try again later.",
            retry_after_s=self._retry_after_s(),
        )

    def _retry_after_s(self) -> float:
        """Estimated time until the queue has drained, from the recent rate of finished requests."""
        now = self._clock()
        recent = [at for at in self._ended if now - at <= _THROUGHPUT_WINDOW_S]
        if not recent:
            return 1.0
        per_s = len(recent) / max(now - recent[0], 1.0)
        return min(_MAX_RETRY_AFTER_S, max(1.0, self._waiting / per_s))
