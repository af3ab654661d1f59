"""Tells the controller that this worker is there: its whole status, every interval, from before the model is loaded.

A status that is not ready makes the models known, so that who asks for one is asked to come again; no request is sent
here. A heartbeat with a status registers by itself at our controller; one of FastChat's answers `exist: false`, and is
then told by `/register_worker`, as soon as the worker is ready. So a controller that was restarted knows the worker
again within one interval.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable

import aiohttp
from pydantic import BaseModel

from fastserve.protocol import HeartbeatRequest, RegisterRequest, WorkerName, WorkerStatus

logger = logging.getLogger(__name__)

_BEAT_TIMEOUT_S = 5.0
_GOODBYE_TIMEOUT_S = 2.0


class Heartbeat:
    def __init__(
        self,
        controller_address: str,
        worker_address: str,
        interval_s: float,
        status: Callable[[], WorkerStatus],
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`ssl_context` is for a controller with an `https` address; None verifies it with the system's authorities."""
        self._controller = controller_address.rstrip("/")
        self._worker = worker_address
        self._interval_s = interval_s
        self._status = status
        self._ssl_context = ssl_context
        self._lock = asyncio.Lock()  # a beat that is on its way must not arrive after the goodbye
        self._wake = asyncio.Event()
        self._silent = False
        self._failing = False
        self._known = False
        self._was_ready = False

    async def run(self) -> None:
        """Beat until cancelled."""
        async with self._open_session(_BEAT_TIMEOUT_S) as session:
            while True:
                self._wake.clear()
                async with self._lock:
                    if not self._silent:
                        await self._beat(session)
                try:
                    async with asyncio.timeout(self._interval_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    def beat_now(self) -> None:
        """Do not wait for the interval's end: the status has changed."""
        self._wake.set()

    async def goodbye(self) -> None:
        """Take this worker out of dispatch and stay silent. A controller that cannot be reached is only logged."""
        self._silent = True
        async with self._lock:
            if not self._known:
                return
            self._known = False
            try:
                async with self._open_session(_GOODBYE_TIMEOUT_S) as session:
                    await self._post(session, "/deregister_worker", WorkerName(worker_name=self._worker))
                logger.info("said goodbye to the controller")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                logger.warning("could not say goodbye to the controller: %s", _cause(error))

    def _open_session(self, timeout_s: float) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(ssl=self._ssl_context or True)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=timeout_s))

    async def _beat(self, session: aiohttp.ClientSession) -> None:
        status = self._status()
        try:
            answer = await self._post(
                session,
                "/receive_heart_beat",
                HeartbeatRequest(worker_name=self._worker, queue_length=status.queue_length, status=status),
            )
            if status.ready and not (isinstance(answer, dict) and answer.get("exist")):
                await self._post(
                    session,
                    "/register_worker",
                    RegisterRequest(worker_name=self._worker, check_heart_beat=True, worker_status=status),
                )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if not self._failing:
                logger.warning("the controller %s cannot be reached: %s; trying on", self._controller, _cause(error))
            self._failing = True
            return
        if self._failing or not self._known or status.ready != self._was_ready:
            state = "registered" if status.ready else "announced (not ready yet)"
            logger.info("%s %s with the controller %s", state, self._worker, self._controller)
        self._failing, self._known, self._was_ready = False, True, status.ready

    async def _post(self, session: aiohttp.ClientSession, path: str, message: BaseModel) -> object:
        body = message.model_dump_json().encode()
        headers = {"Content-Type": "application/json"}
        async with session.post(self._controller + path, data=body, headers=headers) as response:
            response.raise_for_status()
            answer: object = await response.json(content_type=None)
            return answer


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__
