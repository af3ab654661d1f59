"""Where requests are read and become prompts: JSON, chat template, tokens.

Short bodies are done on the event loop, quicker than a thread could be asked. Long ones go to a bounded number of
threads with a bounded queue before them: a thread that renders or tokenises cannot be interrupted, so what it is given
is bounded too (openai/body.py, text/prompt_length.py). Very long bodies have a thread of their own, so that nobody else
waits for them.

A thread that reads a body holds the interpreter's lock, for which the event loop waits. Bodies that end in an answer
are bounded by admission; those that end in a refusal are not, so a thread rests after each of them: all refusals
together take no more than a share of its time.
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
        """`num_threads` for long bodies and one for very long ones; of each kind, `max_waiting` may wait.
        `max_refused_prompt_percent`: share of a thread's time that work which raises a FastserveError may take.
        """
        rest = 100 / max_refused_prompt_percent - 1
        self._lanes = (_Lane("prompt", num_threads, max_waiting, rest), _Lane("long-prompt", 1, max_waiting, rest))

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
    def __init__(self, name: str, num_threads: int, max_waiting: int, rest: float) -> None:
        """`rest`: seconds that a thread rests for each second of refused work."""
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
        answer: Future[ResultT] = Future()

        task = self._executor.submit(self._work, work, answer)

        def task_done(_: Future[None]) -> None:
            answer.cancel()  # unless it is there: the pool was closed
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._done)

        def answer_done(_: Future[ResultT]) -> None:
            if answer.cancelled():
                task.cancel()  # unless it runs: it leaves the queue

        self.pending += 1
        task.add_done_callback(task_done)
        answer.add_done_callback(answer_done)
        return await asyncio.wrap_future(answer)

    def _work(self, work: Callable[[], ResultT], answer: Future[ResultT]) -> None:
        """In a thread: the answer first, then the rest that it costs."""
        if not answer.set_running_or_notify_cancel():
            return
        began_s = time.thread_time()
        is_refused = False
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is awaited
            is_refused = isinstance(error, FastserveError)
            answer.set_exception(error)
        seconds = time.thread_time() - began_s
        del work, answer  # with the body, which nobody else keeps
        if is_refused:
            self._closed.wait(min(MAX_REST_S, self._rest * seconds))

    def _done(self) -> None:
        self.pending -= 1

    def close(self) -> None:
        self._closed.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
