"""A clock that does not count the time during which the process was stopped."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

TICK_S = 0.1
MAX_GAP_S = 0.3


class RunningClock:
    """Seconds for which this process has run; used to time out heartbeats.

    After a controller was stopped, starved or suspended, the heartbeats of that time still wait in its sockets. By the
    plain clock all workers would be overdue, and would be dropped. So a gap between two ticks counts as MAX_GAP_S at
    most. Without ticks (see `ticking`) this is the plain clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._ticked_at = math.inf
        self._skipped_s = 0.0

    def __call__(self) -> float:
        now = self._clock()
        if now - self._ticked_at > MAX_GAP_S:
            self._skipped_s += now - self._ticked_at - MAX_GAP_S
            self._ticked_at = now
        return now - self._skipped_s

    def tick(self) -> None:
        self()
        self._ticked_at = self._clock()

    @asynccontextmanager
    async def ticking(self) -> AsyncIterator[None]:
        """Tick every TICK_S within the block."""
        task = asyncio.create_task(self._tick_for_ever())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _tick_for_ever(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(TICK_S)
