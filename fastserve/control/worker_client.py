"""What the controller asks of workers over HTTP."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator
from types import TracebackType

import aiohttp
from pydantic import ValidationError

from fastserve.errors import WorkerLostError, WorkerTimeoutError
from fastserve.protocol import LEASE_HEADER, WorkerStatus

STATUS_TIMEOUT_S = 5.0
GENERATE_SILENCE_S = 100.0
"""Longest silence of a worker in a relayed answer; FastChat's value."""


class WorkerUnreachableError(WorkerLostError):
    """No connection to the worker, or it broke."""


class WorkerClient:
    """Open it (`async with`) before use; it holds the connections to the workers."""

    _session: aiohttp.ClientSession

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        """`ssl_context` is for `https` addresses; None verifies them with the system's authorities."""
        self._ssl_context = ssl_context

    async def __aenter__(self) -> WorkerClient:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=self._ssl_context or True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get_status(self, address: str) -> WorkerStatus:
        """Raises WorkerUnreachableError; WorkerTimeoutError when the worker is busy; WorkerLostError when it answers,
        but not with a status.
        """
        timeout = aiohttp.ClientTimeout(total=STATUS_TIMEOUT_S)
        try:
            async with self._session.post(f"{address}/worker_get_status", timeout=timeout) as response:
                body = await response.read()
        except TimeoutError as error:
            raise WorkerTimeoutError(f"{address} did not tell its status within {STATUS_TIMEOUT_S:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerUnreachableError(f"{address} cannot be reached: {error}") from error
        try:
            return WorkerStatus.model_validate_json(body)
        except ValidationError as error:
            raise WorkerLostError(f"{address} gave no status (HTTP {response.status})") from error

    async def generate_stream(self, address: str, body: bytes, lease: str) -> AsyncGenerator[bytes, None]:
        """FastChat's `/worker_generate_stream`: the answer's bytes as they come. Raises like `get_status`."""
        headers = {"Content-Type": "application/json", LEASE_HEADER: lease}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=GENERATE_SILENCE_S, sock_connect=STATUS_TIMEOUT_S)
        url = f"{address}/worker_generate_stream"
        try:
            async with self._session.post(url, data=body, headers=headers, timeout=timeout) as response:
                if response.status != 200:
                    raise WorkerLostError(f"{address} answered with HTTP {response.status}")
                async for piece in response.content.iter_any():
                    yield piece
        except TimeoutError as error:
            raise WorkerTimeoutError(f"{address} did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerUnreachableError(f"The connection to {address} broke: {error}") from error
