"""Responses that run in the background: as tasks of this API server, whose events any API server can replay."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from starlette.types import Message

from fastserve.errors import EntryNotFoundError, FastserveError, OverloadedError, ServiceError, ShuttingDownError
from fastserve.gateway.apis.responses import ResponsesApi
from fastserve.gateway.attempt import ClientRequest
from fastserve.gateway.relay import Relay
from fastserve.gateway.stored.entries import Store
from fastserve.openai.answers import KEEP_ALIVE
from fastserve.openai.responses.answer import FIRST_EVENTS_OF_BACKGROUND
from fastserve.serving.errors import unexpected_error

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 0.05
"""Shortest interval at which new events are stored."""
ALIVE_INTERVAL_S = 2.0
POLL_INTERVAL_S = 0.1
"""How often a replay looks for new events."""
KEEP_ALIVE_INTERVAL_S = 1.0


class _StoppedError(Exception):
    """The response was cancelled or deleted."""


@dataclass(frozen=True)
class Run:
    owner: str
    response_id: str
    request: ClientRequest
    api: ResponsesApi
    """The API object of the request; it knows the queued response already."""


class _Recorder:
    """Stands in for the client: stores the events of the answer."""

    def __init__(self, run: Run, store: Store) -> None:
        self._run = run
        self._store = store
        self._num_stored = FIRST_EVENTS_OF_BACKGROUND
        self._stored_at = 0.0
        self._status = 200
        self._error = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif self._status != 200:
            self._error += message.get("body", b"")
        elif time.monotonic() - self._stored_at >= FLUSH_INTERVAL_S:
            await self.store()

    async def store(self) -> None:
        """Store the events that have come. Raises _StoppedError if nobody wants them any more."""
        api = self._run.api
        events, api.events = api.events, []
        if not events:
            return
        is_wanted = await self._store.progress(
            self._run.owner, self._run.response_id, api.response, self._num_stored, events
        )
        if not is_wanted:
            raise _StoppedError
        self._num_stored += len(events)
        self._stored_at = time.monotonic()

    async def end(self, error: FastserveError | None) -> None:
        """Store the end of the answer; `error`: why there is none."""
        api = self._run.api
        if error is not None:
            api.failure(error.body()["error"])
        elif self._status != 200:
            api.failure(msgspec.json.decode(self._error)["error"])
        await self.store()


class BackgroundRuns:
    def __init__(self, relay: Relay, store: Store, max_running: int) -> None:
        self._relay = relay
        self._store = store
        self._max_running = max_running
        self._num_starting = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._alive: asyncio.Task[None] | None = None

    @contextmanager
    def room(self) -> Iterator[None]:
        """Hold a place for a response that is to be started in the block. Raises OverloadedError if there is none."""
        if len(self._tasks) + self._num_starting >= self._max_running:
            raise OverloadedError(
                f"{self._max_running} responses run in the background (--max-background-responses). Try again when "
                "some have ended."
            )
        self._num_starting += 1
        try:
            yield
        finally:
            self._num_starting -= 1

    def start(self, run: Run) -> None:
        """Run a response that the store has as queued."""
        task = asyncio.create_task(self._run(run))
        self._tasks[run.response_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(run.response_id, None))
        if self._alive is None or self._alive.done():
            self._alive = asyncio.create_task(self._note_alive())

    def stop(self, response_id: str) -> None:
        """End the generation of a response, if it runs here; another API server notices by itself."""
        task = self._tasks.get(response_id)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """End all. Their responses have failed."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel("shutdown")
        if self._alive is not None:
            self._alive.cancel()
            tasks.append(self._alive)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, run: Run) -> None:
        recorder = _Recorder(run, self._store)
        error: FastserveError | None = None
        try:
            try:
                await self._relay.forward(run.request, recorder)
            except FastserveError as failure:
                error = failure
            except asyncio.CancelledError as cancelled:
                if cancelled.args != ("shutdown",):
                    raise
                error = ShuttingDownError("The API server that worked on this response was stopped.")
            except _StoppedError:
                raise
            except Exception:
                logger.exception("Response %s failed in the background", run.response_id)
                error = unexpected_error()
            await recorder.end(error)
        except _StoppedError:
            logger.info("Response %s was cancelled or deleted", run.response_id)
        except FastserveError as failure:
            # The store is out of order. Without signs of life, readers will find the response failed.
            logger.error("Response %s could not be stored: %s", run.response_id, failure.message)

    async def _note_alive(self) -> None:
        while self._tasks:
            await asyncio.sleep(ALIVE_INTERVAL_S)
            try:
                ended = await self._store.note_alive(list(self._tasks))
            except ServiceError as failure:
                logger.error("Running responses could not be noted: %s", failure.message)
                continue
            for response_id in ended:
                self.stop(response_id)


async def replay(store: Store, owner: str, response_id: str, after: int) -> AsyncGenerator[bytes, None]:
    """The events of a response that runs or ran in the background, behind number `after`, as they come."""
    silent_since = time.monotonic()
    while True:
        try:
            rows, is_complete = await store.events(owner, response_id, after)
        except EntryNotFoundError:
            return  # deleted
        if rows:
            yield b"".join(content for _, content in rows)
            after, silent_since = rows[-1][0], time.monotonic()
        if is_complete:
            return
        if not rows:
            if time.monotonic() - silent_since >= KEEP_ALIVE_INTERVAL_S:
                yield KEEP_ALIVE
                silent_since = time.monotonic()
            await asyncio.sleep(POLL_INTERVAL_S)
