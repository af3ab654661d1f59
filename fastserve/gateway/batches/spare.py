"""How many requests of batches may run at once: many while nobody else asks, one a worker while somebody does.

Their `priority` puts them behind all others in a worker's queue; what is bounded here is how much they slow the steps
of requests that run beside them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

LOOK_S = 0.1
"""Interval at which a waiting request looks for room again."""


class SpareCapacity:
    def __init__(self, load: Callable[[str], tuple[int, int]], max_idle: int, max_busy: int = 1) -> None:
        """`load`: number of workers of a model, and of requests on all of them. `max_idle`: requests of batches on each
        worker while no others run there; `max_busy`: while others do."""
        self._load = load
        self._max_idle = max_idle
        self._max_busy = max_busy
        self._running: dict[str, int] = {}

    @asynccontextmanager
    async def use(self, model: str) -> AsyncIterator[None]:
        """Wait for room, and hold it."""
        while not self._has_room(model):  # noqa: ASYNC110  the load of others changes without a signal
            await asyncio.sleep(LOOK_S)
        self._running[model] = self._running.get(model, 0) + 1
        try:
            yield
        finally:
            self._running[model] -= 1
            if not self._running[model]:
                del self._running[model]

    def _has_room(self, model: str) -> bool:
        own = self._running.get(model, 0)
        num_workers, in_flight = self._load(model)
        limit = self._max_busy if in_flight > own else self._max_idle
        return own < limit * num_workers
