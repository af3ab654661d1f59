"""Where requests are read and become prompts: JSON, chat template, tokens.

Short bodies are done on the event loop, quicker than a thread could be asked. Long ones go to a bounded number of
threads with a bounded queue before them: a thread that renders or tokenises cannot be interrupted, so what it is given
is bounded too (openai/body.py, text/prompt_length.py). Very long bodies have a thread of their own, so that nobody else
waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fastserve.errors import OverloadedError

ResultT = TypeVar("ResultT")

INLINE_BYTES = 8192
LONG_BYTES = 262_144


class PromptPool:
    def __init__(self, num_threads: int, max_waiting: int) -> None:
        """`num_threads` for long bodies and one for very long ones; of each kind, `max_waiting` may wait."""
        self._lanes = (_Lane("prompt", num_threads, max_waiting), _Lane("long-prompt", 1, max_waiting))

    @property
    def pending(self) -> int:
        """Calls that run in a thread or wait for one."""
        return sum(lane.pending for lane in self._lanes)

    async def run(self, num_bytes: int, work: Callable[[], ResultT]) -> ResultT:
        """The result of `work`, which is about as much as `num_bytes` of a body. Raises OverloadedError.

        A call that is cancelled leaves the queue; one that runs already counts until its thread is done.
        """
        if num_bytes <= INLINE_BYTES:
            return work()
        return await self._lanes[num_bytes > LONG_BYTES].run(work)

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()


class _Lane:
    def __init__(self, name: str, num_threads: int, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._max_pending = num_threads + max_waiting
        self.pending = 0

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        if self.pending >= self._max_pending:
            raise OverloadedError(
                f"This worker is busy: {self.pending} long prompts are being read (--max-preparing). Try again later."
            )
        loop = asyncio.get_running_loop()

        def done(_: Future[ResultT]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._done)

        future = self._executor.submit(work)
        self.pending += 1
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self.pending -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
