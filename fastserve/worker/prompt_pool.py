"""Thread pool for preprocessing requests: parsing JSON, rendering the chat template, tokenizing.

Short bodies are processed on the event loop, which is faster than handing them to a thread. Long ones go to a bounded
queue and a bounded number of threads. A thread that renders or tokenizes cannot be interrupted, so its input is bounded
too (openai/body.py, text/prompt_length.py). Very long bodies have a thread of their own and delay nobody else.

A thread that parses a body holds the GIL, and the event loop waits for it. Admission bounds the requests that are
accepted, but not those that are refused. So a thread sleeps after each refusal, in proportion to the time it took:
refusals in total take a bounded fraction of the thread's time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fastserve.errors import FastserveError, OverloadedError

ResultT = TypeVar("ResultT")

INLINE_BYTES = 8192
LONG_BYTES = 262_144
MAX_REST_S = 1.0


class PromptPool:
    def __init__(self, num_threads: int, max_waiting: int, max_refused_prompt_percent: float = 100) -> None:
        """`num_threads` threads for long bodies and one for very long ones, each with a queue of `max_waiting`.
        `max_refused_prompt_percent`: maximum share of a thread's time for work that raises a FastserveError.
        """
        rest = 100 / max_refused_prompt_percent - 1
        self._lanes = (_Lane("prompt", num_threads, max_waiting, rest), _Lane("long-prompt", 1, max_waiting, rest))

    @property
    def pending(self) -> int:
        """Calls that run in a thread or are queued for one."""
        return sum(lane.pending for lane in self._lanes)

    async def run(self, num_bytes: int, work: Callable[[], ResultT]) -> ResultT:
        """Run `work`, which costs about as much as processing a body of `num_bytes`. Raises OverloadedError.

        A cancelled call leaves the queue. If it already runs, it stays pending until its thread is done.
        """
        if num_bytes <= INLINE_BYTES:
            return work()
        return await self._lanes[num_bytes > LONG_BYTES].run(work)

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()


class _Lane:
    def __init__(self, name: str, num_threads: int, max_waiting: int, rest: float) -> None:
        """`rest`: seconds that a thread sleeps per second of refused work."""
        self._rest = rest
        self._closed = threading.Event()
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._max_pending = num_threads + max_waiting
        self.pending = 0

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        if self.pending >= self._max_pending:
            raise OverloadedError(
                f"This worker is busy: {self.pending} long prompts are being read (--max-preparing). Try again later."
            )
        loop = asyncio.get_running_loop()
        result: Future[ResultT] = Future()

        task = self._executor.submit(self._work, work, result)

        def task_done(_: Future[None]) -> None:
            result.cancel()  # no effect once it is set; without a result the pool was closed
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._done)

        def result_done(_: Future[ResultT]) -> None:
            if result.cancelled():
                task.cancel()  # removes it from the queue unless it already runs

        self.pending += 1
        task.add_done_callback(task_done)
        result.add_done_callback(result_done)
        return await asyncio.wrap_future(result)

    def _work(self, work: Callable[[], ResultT], result: Future[ResultT]) -> None:
        """Runs in a thread: sets the result, then sleeps if it was a refusal."""
        if not result.set_running_or_notify_cancel():
            return
        started_s = time.thread_time()
        is_refused = False
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            is_refused = isinstance(error, FastserveError)
            result.set_exception(error)
        seconds = time.thread_time() - started_s
        del work, result  # frees the body before the sleep
        if is_refused:
            self._closed.wait(min(MAX_REST_S, self._rest * seconds))

    def _done(self) -> None:
        self.pending -= 1

    def close(self) -> None:
        self._closed.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
