"""A queue between the choices of one request, which put deltas into it, and the task that writes the answer."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Many writers and one reader on one event loop. A slow reader gets larger batches."""

    def __init__(self, tick_s: float) -> None:
        """`tick_s`: seconds after which `take` returns an empty list if nothing has been put."""
        self._tick_s = tick_s
        self._loop = asyncio.get_running_loop()
        self._items: list[T] = []
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, item: T) -> None:
        self._items.append(item)
        self._wake()

    def close(self) -> None:
        """Mark the end: nothing may be put afterwards."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    async def take(self) -> list[T] | None:
        """Wait for items and return all of them; [] after `tick_s` without any; None at the end."""
        if not self._items and not self._closed:
            self._waiting_since = self._loop.time()
            if self._timer is None:
                self._timer = self._loop.call_later(self._tick_s, self._tick)
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._items and self._closed:
            return None
        items, self._items = self._items, []
        return items

    def _tick(self) -> None:
        # One timer serves many waits: setting and cancelling one for each would cost more than the wait.
        self._timer = None
        if self._waiter is None:
            return
        left_s = self._waiting_since + self._tick_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._tick)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
