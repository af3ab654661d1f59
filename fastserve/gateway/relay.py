"""The relay: a request's bytes to a worker, its answer's bytes back, another worker when that one fails.

Until the first data event has been sent, the client cannot tell which worker answers, so a failed one is replaced
unseen. Events are relayed whole (cut at blank lines only): whatever happens to the worker, the client never holds half
an event, and an error event can follow. Other than that the stream's bytes are not looked at.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from starlette.types import Send

from fastserve.errors import (
    ModelNotFoundError,
    NoWorkerError,
    OverloadedError,
    RequestError,
    ServiceError,
    WorkerLostError,
    WorkerTimeoutError,
)
from fastserve.gateway.dispatch import Dispatcher, Lease
from fastserve.gateway.downstream import Answer, Downstream
from fastserve.gateway.metrics import GatewayMetrics
from fastserve.gateway.upstream import ConnectionUse
from fastserve.protocol import LEASE_HEADER, REQUEST_ID_HEADER

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
REFUSALS = frozenset({429, 502, 503, 504})
"""Statuses of a worker that cannot answer now, where another one may."""
BLANK_LINES = (b"\n\n", b"\r\n\r\n")
REFUSAL_TYPES = frozenset({ServiceError.type, OverloadedError.type, WorkerTimeoutError.type})
"""The same as REFUSALS, for an error event that comes after keep-alive comments."""
DONE_MARKS = (b"data: [DONE]", b"data:[DONE]")


class StreamCutError(Exception):
    """A worker ended its stream without `[DONE]`."""


WORKER_FAILURES = (aiohttp.ClientError, OSError, StreamCutError)
"""What a worker that goes away looks like from here; TimeoutError is an OSError."""


@dataclass(frozen=True)
class Call:
    """One request of a client."""

    path: str
    body: bytes
    model: str
    stream: bool
    request_id: str
    started_at: float
    """On the relay's clock."""


class Relay:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        dispatcher: Dispatcher,
        metrics: GatewayMetrics,
        worker_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._worker_timeout_s = worker_timeout_s
        self._clock = clock

    async def forward(self, call: Call, send: Send) -> None:
        """Answer the call through `send`, trying each worker of the model at most once.

        Raises a FastserveError only as long as nothing has been sent. Cancelled (the client went away), it closes the
        connection to the worker, which ends the generation there, and gives the lease back.
        """
        client = Downstream(send)
        tried: list[str] = []
        refusal: Answer | None = None
        failure: ServiceError | None = None
        while True:
            try:
                async with self._dispatcher.acquire(call.model, tried) as lease:
                    if tried:
                        self._metrics.retries.inc()
                    tried.append(lease.address)
                    outcome = await self._try_worker(call, lease, client)
            except (NoWorkerError, ModelNotFoundError) as nobody:
                await _give_up(client, refusal or failure or nobody)
                return
            if outcome is None:
                return
            if isinstance(outcome, ServiceError):
                failure = outcome
                if client.has_data:
                    self._metrics.broken_streams.inc()
                    await client.fail(failure.body()["error"])
                    return
            elif outcome.is_broken:
                failure = WorkerLostError(f"The worker failed with status {outcome.status} before it could answer.")
            elif outcome.status in REFUSALS:
                refusal = outcome
            elif outcome.is_foreign:
                failure = NoWorkerError(
                    f"The workers of the model '{call.model}' do not speak OpenAI's API (a FastChat worker is one of "
                    "those); only FastChat's own API server reaches them."
                )
            else:
                await client.answer(outcome)
                return

    async def _try_worker(self, call: Call, lease: Lease, client: Downstream) -> Answer | ServiceError | None:
        """None: a stream was relayed to its end. A ServiceError: the worker failed, and the controller knows it."""
        try:
            if not call.stream:
                return await self._await_answer(lease, self._fetch(call, lease))
            response = await self._post(call, lease, self._worker_timeout_s)
            try:
                if response.status != 200 or response.content_type != "text/event-stream":
                    return await _read_answer(response)
                return await self._relay_events(response.content, call, client)
            finally:
                response.close()
        except WORKER_FAILURES as error:
            kind = _kind(error)
            self._metrics.worker_failures.labels(kind).inc()
            logger.warning(
                "Request %s: worker %s failed (%s: %s)",
                call.request_id,
                lease.address,
                kind,
                str(error) or type(error).__name__,
            )
            await self._dispatcher.report_failure(lease.address)
            if kind == "timeout":
                return WorkerTimeoutError(f"The worker was silent for more than {self._worker_timeout_s:g} s.")
            return WorkerLostError("The worker went away before the answer was complete.")

    async def _post(self, call: Call, lease: Lease, silence_s: float | None) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
        headers = {"content-type": "application/json", LEASE_HEADER: lease.id, REQUEST_ID_HEADER: call.request_id}
        while True:
            use = ConnectionUse()
            try:
                return await self._session.post(
                    lease.address.rstrip("/") + call.path,
                    data=call.body,
                    headers=headers,
                    timeout=timeout,
                    allow_redirects=False,
                    trace_request_ctx=use,
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # A connection from the pool may have been stale, and is now used up: the worker itself may be well.
                if not use.reused:
                    raise

    async def _fetch(self, call: Call, lease: Lease) -> Answer:
        response = await self._post(call, lease, None)
        try:
            return await _read_answer(response)
        finally:
            response.close()

    async def _await_answer(self, lease: Lease, fetching: Coroutine[Any, Any, Answer]) -> Answer:
        """Await a whole answer, during which the wire is silent, for as long as the worker says that it is at it.

        Raises TimeoutError when it has been silent for `worker_timeout_s` and no heartbeat speaks of this lease.
        """
        task = asyncio.ensure_future(fetching)
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=self._worker_timeout_s)
                if done:
                    return task.result()
                if not await self._dispatcher.is_serving(lease):
                    raise TimeoutError
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _relay_events(self, content: aiohttp.StreamReader, call: Call, client: Downstream) -> Answer | None:
        """Relay a stream to its end; an Answer is a refusal that stood in the place of the first data event.

        Raises one of WORKER_FAILURES when the stream ends before `[DONE]`.
        """
        last = b""
        held = b""
        try:
            while piece := await content.readany():
                if held:
                    piece = held + piece
                    held = b""
                if not piece.endswith(BLANK_LINES):
                    cut = _end_of_events(piece)
                    piece, held = piece[:cut], piece[cut:]
                    if not piece:
                        continue
                if not client.has_data and (data := _first_data(piece)):
                    if _is_refusal(data):
                        return Answer(ServiceError.status, "application/json", None, data)
                    client.has_data = True
                    self._metrics.time_to_first_token.observe(self._clock() - call.started_at)
                last = piece
                await client.write(piece)
        except WORKER_FAILURES:
            if not _is_done(last):
                raise
        if not _is_done(last + held):
            raise StreamCutError("its stream ended without [DONE]")
        if held:
            await client.write(held)
        await client.end()
        return None


async def _give_up(client: Downstream, last: Answer | ServiceError | RequestError) -> None:
    """No worker is left: the client gets what the last ones said."""
    if isinstance(last, Answer):
        await client.answer(last)
    elif client.started:
        await client.fail(last.body()["error"])
    else:
        raise last


async def _read_answer(response: aiohttp.ClientResponse) -> Answer:
    body = await response.read()
    content_type = response.headers.get("content-type", "application/json")
    return Answer(response.status, content_type, response.headers.get("retry-after"), body)


def _kind(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return "connect"
    return "timeout" if isinstance(error, TimeoutError) else "lost"


def _end_of_events(piece: bytes) -> int:
    """Where the last whole event ends, past its blank line; 0 when there is none."""
    return max((at + len(mark) for mark in BLANK_LINES if (at := piece.rfind(mark)) >= 0), default=0)


def _first_data(events: bytes) -> bytes:
    """The first line that is no comment, without its field name; empty when there are only comments."""
    lines = (line for line in events.splitlines() if line and not line.startswith(b":"))
    return next(lines, b"").removeprefix(b"data:").strip()


def _is_refusal(data: bytes) -> bool:
    """Whether the data of a first event says that this worker cannot answer now, where another one may."""
    if not data.startswith(b'{"error"'):
        return False
    try:
        return msgspec.json.decode(data)["error"]["type"] in REFUSAL_TYPES
    except (msgspec.DecodeError, KeyError, TypeError):
        return False


def _is_done(end: bytes) -> bool:
    return end.rstrip().endswith(DONE_MARKS)
