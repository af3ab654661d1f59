"""Who may generate now: a number of permits, a bounded queue behind them, and 429 past that.

A permit belongs to one client request, all its choices together. It lives inside `async with`, so it ends with the
stream whatever ends the stream. The queue is served by priority, and in order of arrival within one priority.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import insort
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastserve.errors import OverloadedError

_THROUGHPUT_WINDOW_S = 30.0
_MOST_RETRY_AFTER_S = 60.0


class Admission:
    def __init__(self, limit: int, queue_size: int, clock: Callable[[], float]) -> None:
        """`limit` requests run at once, `queue_size` wait; `clock` tells seconds."""
        self.limit = limit
        self.queue_size = queue_size
        self._clock = clock
        self._running = 0
        self._numbers = itertools.count()
        # By priority, then arrival. Whenever somebody waits, all permits are taken: one that is given back is handed
        # on at once, so that nobody who comes in between can take it.
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._leases: Counter[str] = Counter()
        self._ended: deque[float] = deque(maxlen=256)

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def leases(self) -> list[str]:
        """Lease ids of the requests that run or wait."""
        return list(self._leases)

    @asynccontextmanager
    async def permit(self, lease: str | None = None, priority: int = 0) -> AsyncIterator[None]:
        """Wait for a turn, lower priorities first, and hold it. Raises OverloadedError when the queue is full."""
        if self._running >= self.limit and self.waiting >= self.queue_size:
            raise OverloadedError(
                f"This worker is busy: {self._running} requests run and {self.waiting} wait (--queue-size). "
                "Try again later.",
                retry_after_s=self._retry_after_s(),
            )
        if lease is not None:
            self._leases[lease] += 1
        try:
            await self._acquire(priority)
            try:
                yield
            finally:
                self._release()
                self._ended.append(self._clock())
        finally:
            if lease is not None:
                self._leases[lease] -= 1
                if not self._leases[lease]:
                    del self._leases[lease]

    async def _acquire(self, priority: int) -> None:
        if self._running < self.limit:
            self._running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (priority, next(self._numbers), turn)
        insort(self._queue, place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._queue.remove(place)
            else:
                self._release()  # the turn came in the same moment
            raise

    def _release(self) -> None:
        """Hand the permit to the first in the queue, if there is one."""
        for at, (_, _, turn) in enumerate(self._queue):
            if not turn.done():  # one that was cancelled a moment ago takes itself out
                del self._queue[at]
                turn.set_result(None)
                return
        self._running -= 1

    def _retry_after_s(self) -> float:
        """When the queue should have moved on by its own length, going by the requests that ended lately."""
        now = self._clock()
        recent = [at for at in self._ended if now - at <= _THROUGHPUT_WINDOW_S]
        if not recent:
            return 1.0
        per_s = len(recent) / max(now - recent[0], 1.0)
        return min(_MOST_RETRY_AFTER_S, max(1.0, self.waiting / per_s))
