"""Sends the worker's full status to the controller in every interval, beginning before the model is loaded.

A worker that is not ready gets no requests, but its models are known, so that clients are asked to retry. fastserve's
controller registers a worker by its heartbeat. FastChat's replies `exist: false` to it, and the worker registers with
`/register_worker` once it is ready. So a restarted controller knows all workers again after one interval. Workers that
were started together do not send in lockstep (`pauses_s`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
from pydantic import BaseModel

from fastserve.access.cluster_key import ClusterKeys
from fastserve.access.key_files import Reloadable
from fastserve.access.outgoing import CleanRequest, FinalResponse, read_bounded, send_cluster_key
from fastserve.protocol import AdapterEntry, HeartbeatRequest, RegisterRequest, WorkerName, WorkerStatus

logger = logging.getLogger(__name__)

MAX_JITTER = 0.1
"""Maximum fraction of the interval by which a heartbeat is early."""
_BEAT_TIMEOUT_S = 5.0
_GOODBYE_TIMEOUT_S = 2.0
_MAX_ANSWER_BYTES = 64 * 1024
_MAX_SHOWN_CHARS = 500


def pauses_s(interval_s: float, rng: random.Random) -> Iterator[float]:
    """Infinite pauses between heartbeats, none longer than the interval.

    The first is a random fraction of the interval, which spreads thousands of workers that were started together over
    it; the others are jittered, so that the workers stay spread.
    """
    yield interval_s * rng.random()
    while True:
        yield interval_s * rng.uniform(1.0 - MAX_JITTER, 1.0)


class Heartbeat:
    def __init__(
        self,
        controller_address: str,
        worker_address: str,
        interval_s: float,
        status: Callable[[], WorkerStatus],
        adapters: Callable[[], list[AdapterEntry]],
        keys: Reloadable[ClusterKeys | None],
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`ssl_context` is used for an `https` controller; None: use the system's certificate authorities."""
        self._keys = keys
        self._controller = controller_address.rstrip("/")
        self._worker = worker_address
        self._interval_s = interval_s
        self._status = status
        self._adapters = adapters
        self._ssl_context = ssl_context
        self._lock = asyncio.Lock()  # a heartbeat in flight must not arrive after the deregistration
        self._wake = asyncio.Event()
        self._deregistered = False
        self._failing = False
        self._refusal: str | None = None
        self._registered = False
        self._was_ready = False

    async def run(self) -> None:
        """Send heartbeats until cancelled."""
        async with self._open_session(_BEAT_TIMEOUT_S) as session:
            for pause_s in pauses_s(self._interval_s, random.Random()):
                self._wake.clear()
                async with self._lock:
                    if not self._deregistered:
                        await self._beat(session)
                try:
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    def beat_now(self) -> None:
        """Send the next heartbeat now, because the status has changed."""
        self._wake.set()

    async def deregister(self) -> None:
        """Deregister from the controller and stop sending. An unreachable controller is only logged."""
        self._deregistered = True
        async with self._lock:
            if not self._registered:
                return
            self._registered = False
            try:
                async with self._open_session(_GOODBYE_TIMEOUT_S) as session:
                    await self._post(session, "/deregister_worker", WorkerName(worker_name=self._worker))
                logger.info("said goodbye to the controller")
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                logger.warning("could not say goodbye to the controller: %s", _cause(error))

    def _open_session(self, timeout_s: float) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._ssl_context or True),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            request_class=CleanRequest,
            response_class=FinalResponse,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[send_cluster_key(self._keys)],
        )

    async def _beat(self, session: aiohttp.ClientSession) -> None:
        status = self._status()
        try:
            beat = HeartbeatRequest(worker_name=self._worker, queue_length=status.queue_length, status=status)
            answer = await self._post(session, "/receive_heart_beat", beat)
            if isinstance(answer, dict) and answer.get("send_adapters"):
                listed = beat.model_copy(update={"adapters": self._adapters()})
                answer = await self._post(session, "/receive_heart_beat", listed)
            if status.ready and not (isinstance(answer, dict) and answer.get("exist")):
                await self._post(
                    session,
                    "/register_worker",
                    RegisterRequest(worker_name=self._worker, check_heart_beat=True, worker_status=status),
                )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # A new refusal is logged even if the controller was unreachable before.
            refusal = str(error) if isinstance(error, _RefusedError) else None
            if not self._failing or refusal not in (None, self._refusal):
                logger.warning("the controller %s cannot be reached: %s; retrying", self._controller, _cause(error))
            self._failing = True
            self._refusal = refusal or self._refusal
            return
        if self._failing or not self._registered or status.ready != self._was_ready:
            state = "registered" if status.ready else "announced (not ready yet)"
            logger.info("%s %s with the controller %s", state, self._worker, self._controller)
        self._failing, self._registered, self._was_ready, self._refusal = False, True, status.ready, None

    async def _post(self, session: aiohttp.ClientSession, path: str, message: BaseModel) -> object:
        body = message.model_dump_json().encode()
        headers = {"Content-Type": "application/json"}
        url = self._controller + path
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            content = await read_bounded(response, _MAX_ANSWER_BYTES)
            if response.status != 200:
                raise _RefusedError(response.status, content)
            return _parse(content)


class _RefusedError(ValueError):
    """The controller responded with an error, whose message says what to do."""

    def __init__(self, status: int, content: bytes) -> None:
        try:
            answer: Any = _parse(content)
            reason = str(answer["error"]["message"])
        except (ValueError, KeyError, TypeError):
            reason = "no reason was given"
        super().__init__(f"status {status}: {reason[:_MAX_SHOWN_CHARS]!a}")


def _parse(content: bytes) -> object:
    """Parse JSON. Raises only ValueError, whatever the content is."""
    try:
        answer: object = json.loads(content)
    except RecursionError as error:
        raise ValueError("the answer is nested too deep to be a controller's") from error
    return answer


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__
