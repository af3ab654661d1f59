"""How many requests of batches may run at once: one a worker while somebody else asks, and more with each quiet second.

Their `priority` puts them behind all others in a worker's queue; what is bounded here is how much they slow the steps
of requests that run beside them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

LOOK_S = 0.1
"""Interval at which a waiting request looks for room again."""


@dataclass
class _Use:
    """Use of one model's workers."""

    quiet_since: float
    running: int = 0
    waiting: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the request that looks for room; the others wait for it in order."""


class SpareCapacity:
    def __init__(
        self,
        load: Callable[[str], tuple[int, int]],
        max_idle: int,
        max_busy: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load`: number of workers of a model, and of requests on all of them. `max_busy`: requests of batches on each
        worker while others run there; one more with each second without any, up to `max_idle`.
        """
        self._load = load
        self._max_idle = max_idle
        self._max_busy = max_busy
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @asynccontextmanager
    async def use(self, model: str) -> AsyncIterator[None]:
        """Wait for room, and hold it."""
        use = self._uses.setdefault(model, _Use(self._clock()))
        use.waiting += 1
        try:
            async with use.turn:
                while not self._has_room(model, use):  # noqa: ASYNC110  the load of others changes without a signal
                    await asyncio.sleep(LOOK_S)
                use.running += 1
            try:
                yield
            finally:
                use.running -= 1
        finally:
            use.waiting -= 1
            if not use.waiting:
                del self._uses[model]

    def _has_room(self, model: str, use: _Use) -> bool:
        num_workers, in_flight = self._load(model)
        now = self._clock()
        if in_flight > use.running:
            use.quiet_since = now
        limit = min(self._max_idle, self._max_busy + int(now - use.quiet_since))
        return use.running < limit * num_workers
