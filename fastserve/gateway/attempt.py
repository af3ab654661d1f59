"""One attempt of a request at one worker."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import aiohttp

from fastserve.errors import (
    FastserveError,
    InvalidAnswerError,
    ShortageError,
    WorkerLostError,
    WorkerTimeoutError,
)
from fastserve.gateway.answers import (
    Answer,
    ByteBudget,
    Contents,
    check_answer,
    check_headers,
    parse_body,
    read_answer,
)
from fastserve.gateway.apis import Api
from fastserve.gateway.body import AnswerBody
from fastserve.gateway.dispatch import Dispatcher, Lease
from fastserve.gateway.downstream import Downstream
from fastserve.gateway.events import open_stream
from fastserve.gateway.upstream import ConnectionUse
from fastserve.openai.routes import ModelRoute
from fastserve.protocol import HOPS_HEADER, LEASE_HEADER, MAY_PRIORITISE_HEADER, REQUEST_ID_HEADER, SEED_HEADER
from fastserve.serving.shortage import is_own_shortage

CONNECT_TIMEOUT_S = 3.0
LAST_CHUNK_S = 0.2
"""How long to wait for the end of the body after `[DONE]`, so that the connection can be reused."""
MAX_HELD_ANSWERS = 2
"""Memory for answers being read, as a multiple of the longest allowed answer."""


@dataclass(frozen=True)
class ClientRequest:
    """One request of a client."""

    route: ModelRoute
    body: bytes
    model: str
    stream: bool
    request_id: str
    hops: str
    """Value of HOPS_HEADER for the worker."""
    started_at: float
    """Monotonic seconds, on the relay's clock."""
    seed: int
    """Sampling seed for a request without one: with it each attempt samples the same tokens."""
    api: Api
    may_prioritise: bool = False
    """Whether the client's key may raise the priority of requests."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """More headers for the worker."""


@dataclass(frozen=True)
class AnswerBounds:
    """Limits on a worker's answer: time without data in seconds, and sizes in bytes."""

    silence_s: float
    max_answer_bytes: int
    max_event_bytes: int
    max_stream_bytes: int


class AttemptError(Exception):
    """The worker failed. `error` is what the client gets when no other worker can take over.

    `kind` is one of: refused (nothing listens at the address), connect (no connection in time), lost (the connection
    broke while the worker had the request), cut (a stream without its end), timeout (no data for too long), frozen (no
    data and no heartbeats), invalid (an invalid answer).
    """

    def __init__(self, kind: str, error: FastserveError, cause: BaseException | None = None) -> None:
        super().__init__(error.message if cause is None else str(cause) or type(cause).__name__)
        self.kind = kind
        self.error = error


class _Deadline:
    """An asyncio timeout that is triggered by `expire`."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self._timeout = timeout
        self.reason: str | None = None
        """Kind of failure that triggered it."""

    def expire(self, reason: str) -> None:
        """End the block with a TimeoutError at the event loop's next iteration."""
        if self.reason is None:
            self.reason = reason
            self._timeout.reschedule(asyncio.get_running_loop().time())


class AttemptRunner:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        dispatcher: Dispatcher,
        bounds: AnswerBounds,
        on_first_data: Callable[[ClientRequest], None],
    ) -> None:
        self._session = session
        self._dispatcher = dispatcher
        self._bounds = bounds
        self._memory = ByteBudget(MAX_HELD_ANSWERS * bounds.max_answer_bytes)
        self._on_first_data = on_first_data

    async def run(self, request: ClientRequest, lease: Lease, client: Downstream) -> Answer | None:
        """Returns a checked answer, or None after a stream was relayed to its end.

        Raises AttemptError if the worker failed, ShortageError if this process has no file or port left, or no memory
        for the answer.
        """
        try:
            async with asyncio.timeout(None) as timeout:
                deadline = _Deadline(timeout)
                with self._dispatcher.watching(lease.address, lambda: deadline.expire("frozen")):
                    if request.stream:
                        return await self._relay_stream(request, lease, client, deadline)
                    return await self._read_whole(request, lease, deadline)
        except InvalidAnswerError as error:
            raise AttemptError("invalid", error) from error
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            if is_own_shortage(error):
                raise ShortageError(
                    "This API server has no open file or port left for a worker. Try again in a moment.",
                    code="server_out_of_resources",
                ) from error
            raise self._failure(deadline.reason or _kind(error), error) from error

    async def _read_whole(self, request: ClientRequest, lease: Lease, deadline: _Deadline) -> Answer:
        """No data comes before the whole answer, so heartbeats show that the worker is at work on it."""
        watch = asyncio.create_task(self._expire_when_idle(lease, deadline))
        try:
            response = await self._post(request, lease, None)
            try:
                with self._open_body(response, deadline) as body:
                    return await self._read_answer(request, response, body)
            finally:
                response.close()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _expire_when_idle(self, lease: Lease, deadline: _Deadline) -> None:
        while True:
            await asyncio.sleep(self._bounds.silence_s)
            if not await self._dispatcher.is_serving(lease):
                deadline.expire("timeout")
                return

    async def _relay_stream(
        self, request: ClientRequest, lease: Lease, client: Downstream, deadline: _Deadline
    ) -> Answer | None:
        # Bounds headers that come byte by byte, which `sock_read` does not.
        silence = asyncio.get_running_loop().call_later(self._bounds.silence_s, deadline.expire, "timeout")
        try:
            response = await self._post(request, lease, self._bounds.silence_s)
        finally:
            silence.cancel()
        try:
            with self._open_body(response, deadline, self._bounds.silence_s) as body:
                if response.status != 200:
                    return await self._read_answer(request, response, body)
                check_headers(response.headers, request.api.media_type)
                return await self._relay_events(body, request, client)
        finally:
            response.close()

    async def _relay_events(self, body: AnswerBody, request: ClientRequest, client: Downstream) -> Answer | None:
        """Relay a stream to its end and return None, or return an error event that came before any data."""
        api = request.api
        stream = open_stream(self._bounds.max_event_bytes, self._bounds.max_stream_bytes, api)
        while not stream.is_done:
            piece = await body.read()
            events = stream.feed(piece) if piece else stream.finish()
            if stream.error is not None and not client.has_data and not stream.has_data:
                return _refusal(api, stream.error)
            if stream.has_data and not client.has_data:
                client.has_data = True
                self._on_first_data(request)
            if events:
                await client.write(events)
                body.note_progress()
            if not piece:
                break
        if not stream.is_done:
            if stream.error is None:
                raise AttemptError(
                    "cut", WorkerLostError("The worker ended its stream before the answer was complete.")
                )
            if api.end_of_errors:
                await client.write(api.end_of_errors)
        await client.end()
        await _read_last_chunk(body)
        return None

    async def _read_answer(self, request: ClientRequest, response: aiohttp.ClientResponse, body: AnswerBody) -> Answer:
        route = request.route
        contents = Contents(route.contents, route.contents_kind, plain_errors=request.api.plain_errors)
        return await read_answer(response, body, self._bounds.max_answer_bytes, self._memory, contents)

    def _open_body(
        self, response: aiohttp.ClientResponse, deadline: _Deadline, silence_s: float = math.inf
    ) -> AnswerBody:
        return AnswerBody(response, lambda: deadline.expire("invalid"), lambda: deadline.expire("timeout"), silence_s)

    async def _post(self, request: ClientRequest, lease: Lease, silence_s: float | None) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
        headers = {
            "content-type": "application/json",
            LEASE_HEADER: lease.id,
            REQUEST_ID_HEADER: request.request_id,
            HOPS_HEADER: request.hops,
            MAY_PRIORITISE_HEADER: "1" if request.may_prioritise else "0",
            SEED_HEADER: str(request.seed),
            **request.headers,
        }
        lost: aiohttp.ClientError | None = None
        while True:
            use = ConnectionUse()
            try:
                return await self._session.post(
                    lease.address.rstrip("/") + request.route.path,
                    data=request.body,
                    headers=headers,
                    timeout=timeout,
                    allow_redirects=False,
                    trace_request_ctx=use,
                )
            except aiohttp.ClientConnectorError as error:
                if lost is None:
                    raise
                # The worker died while it had the request.
                raise lost from error
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # A pooled connection may have been stale, and is gone now: try again, the worker may be well.
                if not use.reused:
                    raise
                lost = error

    def _failure(self, kind: str, error: BaseException) -> AttemptError:
        if kind == "invalid":
            return AttemptError(kind, InvalidAnswerError("The worker's answer breaks the rules of HTTP."), error)
        if kind == "timeout":
            silence_s = self._bounds.silence_s
            return AttemptError(
                kind, WorkerTimeoutError(f"The worker was silent for more than {silence_s:g} s."), error
            )
        if kind == "frozen":
            return AttemptError(kind, WorkerLostError("The worker stopped before the answer was complete."), error)
        return AttemptError(kind, WorkerLostError("The worker went away before the answer was complete."), error)


def _refusal(api: Api, data: bytes) -> Answer:
    """Turn an error event that came before any data into an answer with the matching status."""
    contents = Contents(plain_errors=api.plain_errors)
    error = parse_body(data, contents).error
    status = 500 if error is None else api.error_statuses.get(error.type or "", 500)
    for stated in () if error is None else (error.status, error.code):  # vLLM gives the status as code
        if isinstance(stated, int) and 400 <= stated < 600:
            status = stated
    return check_answer(status, api.error_body(data), None, contents)


async def _read_last_chunk(body: AnswerBody) -> None:
    """Read the end of the body, if it comes within LAST_CHUNK_S, so that the connection can be reused."""
    try:
        async with asyncio.timeout(LAST_CHUNK_S):
            await body.read()
    except (aiohttp.ClientError, OSError):
        return  # The answer is complete; the connection will be closed.


def _kind(error: BaseException) -> str:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "connect"
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.InvalidURL):
        return "refused"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientResponseError):
        return "invalid"
    if isinstance(error, aiohttp.ClientPayloadError) and "not completed" not in str(error):
        return "invalid"
    return "lost"
