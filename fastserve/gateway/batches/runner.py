"""Runs batches: takes one after the other, sends their requests through the relay, and writes their answers.

A batch is run by one API server process at a time. If that process dies, another one, or the next of its kind, goes on
after the last answer that was written.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastserve.errors import EntryNotFoundError, FastserveError
from fastserve.gateway.batches.lines import (
    BatchLine,
    InputReader,
    OutputFile,
    answer_line,
    check_input,
    unanswered_line,
)
from fastserve.gateway.batches.spare import SpareCapacity
from fastserve.gateway.batches.store import SILENCE_S, BatchStore
from fastserve.openai.answers import encode_json
from fastserve.openai.batches import ENDED, OUTPUT_PURPOSE, Batch, BatchError, BatchErrors, File, Status

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Interval at which a process looks for batches that nobody runs."""
SIGN_S = 1.0
"""Interval of signs of life, at which progress is written and a cancellation is noticed."""
MAX_SIGN_AGE_S = SILENCE_S - 3 * SIGN_S
"""Age of the last sign of life from which on nothing is written any more: another process may have the batch soon."""
MAX_AT_ONCE = 4
"""Batches that one process runs at the same time."""
MAX_STARTED = 256
"""Requests of one batch that wait for room at the same time."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
RETRIED = frozenset({408, 429, 502, 503, 504})
"""Statuses after which a request is sent again: nobody could take it now."""
MAX_FAILURES = 5
"""Attempts of one request that may end with a failure of the service; refusals for lack of room do not count."""
NO_ROOM = frozenset({429, 503})
_NO_INPUT = BatchError(
    "file_not_found", "The input file is not there any more. Upload it again.", param="input_file_id"
)

Send = Callable[[str, bytes, str], Awaitable[tuple[int, bytes]]]
"""Sends a request to a route: (path, body, request id) to (status, body)."""
ModelOf = Callable[[str, bytes], Awaitable[str]]
"""The model that a request is for, by its route and body."""


@dataclass
class _Work:
    """A batch that runs here."""

    owner: str
    batch: Batch
    output: OutputFile
    errors: OutputFile
    signed_at: float
    """Time of the last sign of life, by the store's clock."""
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    """It was cancelled, or another process has it."""
    is_ours: bool = True

    def drop(self) -> None:
        """Leave it to another process."""
        self.is_ours = False
        self.stopped.set()


class BatchRunner:
    def __init__(self, store: BatchStore, send: Send, model_of: ModelOf, spare: SpareCapacity) -> None:
        self._store = store
        self._send = send
        self._model_of = model_of
        self._spare = spare
        self._name = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """A batch was added."""
        self._wake.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run batches until the end of the block."""
        task = asyncio.create_task(self._run_all())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await self._store.let_go(self._name)

    async def _run_all(self) -> None:
        running: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                self._wake.clear()
                try:
                    while len(running) < MAX_AT_ONCE:
                        claimed = await self._store.claim(self._name, running)
                        if claimed is None:
                            break
                        running[claimed[1].id] = asyncio.create_task(self._run_one(*claimed))
                except FastserveError as error:
                    logger.error("batches cannot be read: %s", error.message)
                waker = asyncio.create_task(self._wake.wait())
                await asyncio.wait({waker, *running.values()}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                waker.cancel()
                running = {batch_id: task for batch_id, task in running.items() if not task.done()}
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _run_one(self, owner: str, batch: Batch) -> None:
        output, errors = self._output(batch.id, "output"), self._output(batch.id, "errors")
        work = _Work(owner, batch, output, errors, self._store.clock())
        try:
            try:
                await self._run_batch(work)
            except (FastserveError, OSError):
                raise
            except Exception:
                logger.exception("batch %s failed", batch.id)
                self._fail(batch, BatchError("internal_error", "The server failed while it ran the batch."))
                if work.is_ours:
                    await self._finish(work)
        except (FastserveError, OSError) as error:
            # The store is out of reach, or its disk full. The batch goes on, here or elsewhere, once that is over.
            logger.error("batch %s was interrupted: %s", batch.id, getattr(error, "message", error))

    async def _run_batch(self, work: _Work) -> None:
        batch = work.batch
        answered = await asyncio.to_thread(work.output.recover) | await asyncio.to_thread(work.errors.recover)
        counts = batch.request_counts
        counts.completed, counts.failed = work.output.num_lines, work.errors.num_lines
        async with self._signs(work):
            if batch.status == "validating":
                await self._validate(work.owner, batch)
                await self._sign(work)
            elif batch.status == "in_progress" and not await asyncio.to_thread(self._input(batch).exists):
                self._fail(batch, _NO_INPUT)
            if batch.status == "in_progress":
                await self._answer_all(work, answered)
        if work.is_ours:
            await self._finish(work)

    async def _validate(self, owner: str, batch: Batch) -> None:
        try:
            await self._store.file(owner, batch.input_file_id)
            most = self._store.bounds.max_requests
            checked = await asyncio.to_thread(check_input, self._input(batch), batch.endpoint, most)
        except (EntryNotFoundError, FileNotFoundError):
            self._fail(batch, _NO_INPUT)
            return
        batch.model = checked.model
        if checked.errors:
            self._fail(batch, *checked.errors)
            return
        batch.request_counts.total = checked.num_requests
        batch.status, batch.in_progress_at = "in_progress", self._now()

    @asynccontextmanager
    async def _signs(self, work: _Work) -> AsyncIterator[None]:
        """Give signs of life during the block."""

        async def give() -> None:
            while not work.stopped.is_set():
                await asyncio.sleep(SIGN_S)
                try:
                    await self._sign(work)
                except FastserveError as error:
                    logger.error("batch %s: no sign of life could be given: %s", work.batch.id, error.message)
                    if self._is_late(work):
                        work.drop()

        task = asyncio.create_task(give())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _sign(self, work: _Work) -> None:
        """Give a sign of life, and write how far the batch is."""
        now = self._store.clock()
        if await self._store.update(self._name, work.batch):
            work.signed_at = now
        elif work.batch.status == "cancelling":
            work.stopped.set()
        else:
            work.drop()

    def _is_late(self, work: _Work) -> bool:
        return self._store.clock() - work.signed_at > MAX_SIGN_AGE_S

    async def _answer_all(self, work: _Work, answered: frozenset[str]) -> None:
        """Answer the requests that have no answer yet, until the batch is stopped or expires."""
        reader = InputReader(self._input(work.batch), answered)
        pending: set[asyncio.Task[None]] = set()
        stopped = asyncio.create_task(work.stopped.wait())
        try:
            async with asyncio.timeout(max(0.0, work.batch.expires_at - self._store.clock())):
                while not work.stopped.is_set() and (lines := await asyncio.to_thread(reader.read)):
                    for line in lines:
                        pending.add(asyncio.create_task(self._answer(work, line)))
                        if len(pending) >= MAX_STARTED:
                            pending = await _wait_one(pending, stopped)
                while pending and not work.stopped.is_set():
                    pending = await _wait_one(pending, stopped)
        except TimeoutError:
            logger.info("batch %s expired", work.batch.id)
        finally:
            stopped.cancel()
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _answer(self, work: _Work, line: BatchLine) -> None:
        number = f"batch_req_{secrets.token_hex(12)}"
        try:
            model = await self._model_of(work.batch.endpoint, line.body)
            status, body = await self._send_until_taken(work.batch.endpoint, line.body, model, number)
        except FastserveError as error:
            status, body = error.status, encode_json(error.body())
        # A line is written whole, and counted, before whoever cancels this goes on.
        writing = asyncio.create_task(self._write(work, line.custom_id, number, status, body))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing
            raise

    async def _write(self, work: _Work, custom_id: str, number: str, status: int, body: bytes) -> None:
        if self._is_late(work):  # this process was frozen, or has no store: another one may have the batch
            work.drop()
            return
        is_good = status == 200
        file = work.output if is_good else work.errors
        await asyncio.to_thread(file.append, answer_line(number, custom_id, status, number, body))
        if is_good:
            work.batch.request_counts.completed += 1
        else:
            work.batch.request_counts.failed += 1

    async def _send_until_taken(self, path: str, body: bytes, model: str, number: str) -> tuple[int, bytes]:
        pause_s, num_failures = FIRST_PAUSE_S, 0
        while True:
            async with self._spare.use(model):
                status, answer = await self._send(path, body, number)
            if status not in RETRIED:
                return status, answer
            num_failures += status not in NO_ROOM
            if num_failures >= MAX_FAILURES:
                return status, answer
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def _finish(self, work: _Work) -> None:
        batch = work.batch
        ended = batch.status if batch.status in ENDED else await self._end_of(work)
        if ended == "completed":
            batch.status, batch.finalizing_at = "finalizing", self._now()
        batch.output_file_id = await self._keep(work, work.output, "output")
        batch.error_file_id = await self._keep(work, work.errors, "errors")
        self._end(batch, ended)
        await self._store.update(self._name, batch)
        logger.info(
            "batch %s is %s: %d answers, %d errors",
            batch.id,
            batch.status,
            work.output.num_lines,
            work.errors.num_lines,
        )

    async def _end_of(self, work: _Work) -> Status:
        """How a batch ends whose requests are not sent any more."""
        counts = work.batch.request_counts
        if work.batch.status == "cancelling":
            return "cancelled"
        if counts.completed + counts.failed < counts.total:
            await asyncio.to_thread(self._write_expired, work)
            return "expired"
        return "completed"

    def _write_expired(self, work: _Work) -> None:
        done = work.output.recover() | work.errors.recover()
        reader = InputReader(self._input(work.batch), done)
        message = "The request had no answer within the batch's completion_window."
        while lines := reader.read():
            for line in lines:
                number = f"batch_req_{secrets.token_hex(12)}"
                work.errors.append(unanswered_line(number, line.custom_id, "batch_expired", message))
                work.batch.request_counts.failed += 1

    async def _keep(self, work: _Work, written: OutputFile, kind: str) -> str | None:
        """Give the client the lines that were written as a file; None if there are none. It always gets the same id, so
        that this may be done again."""
        if not written.num_lines:
            return None
        file_id = _output_id(work.batch.id, kind)
        size = await asyncio.to_thread(lambda: written.path.stat().st_size)
        name = f"{work.batch.id}_{kind}.jsonl"
        await self._store.add_file(work.owner, File(file_id, size, self._now(), name, OUTPUT_PURPOSE))
        return file_id

    def _input(self, batch: Batch) -> Path:
        return self._store.path_of(batch.input_file_id)

    def _output(self, batch_id: str, kind: str) -> OutputFile:
        return OutputFile(self._store.path_of(_output_id(batch_id, kind)))

    def _fail(self, batch: Batch, *errors: BatchError) -> None:
        batch.errors = BatchErrors(list(errors))
        self._end(batch, "failed")

    def _end(self, batch: Batch, status: Status) -> None:
        batch.status = status
        setattr(batch, f"{status}_at", self._now())

    def _now(self) -> int:
        return int(self._store.clock())


async def _wait_one(pending: set[asyncio.Task[None]], stopped: asyncio.Task[bool]) -> set[asyncio.Task[None]]:
    """Wait until a task is done or `stopped` is, and return those that are not. Raises what a task failed with."""
    await asyncio.wait({*pending, stopped}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        if task.done():
            task.result()
    return {task for task in pending if not task.done()}


def _output_id(batch_id: str, kind: str) -> str:
    return f"file-{batch_id.removeprefix('batch_')}-{kind}"
