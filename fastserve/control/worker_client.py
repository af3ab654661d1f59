"""HTTP client for the controller's requests to workers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator
from types import TracebackType

import aiohttp
from pydantic import ValidationError

from fastserve.access.cluster_key import ClusterKeys
from fastserve.access.key_files import Reloadable
from fastserve.access.outgoing import CleanRequest, FinalResponse, read_bounded, send_cluster_key
from fastserve.access.resolving import NetworkResolver
from fastserve.errors import ServiceError, ShortageError, WorkerLostError, WorkerTimeoutError
from fastserve.protocol import HOPS_HEADER, LEASE_HEADER, WorkerStatus
from fastserve.serving.shortage import is_own_shortage

STATUS_TIMEOUT_S = 5.0
GENERATE_SILENCE_S = 100.0
"""Longest time without data in a relayed answer; FastChat's value."""


class WorkerUnreachableError(WorkerLostError):
    """A connection to the worker failed or broke."""


class WorkerBrokenError(WorkerUnreachableError):
    """The connection broke while the worker had the request."""


class WorkerClient:
    """Use it as an async context manager; it holds the connections to the workers.

    It follows no redirects, and resolves names with `resolver` for each new connection.
    """

    _session: aiohttp.ClientSession

    def __init__(
        self,
        keys: Reloadable[ClusterKeys | None],
        resolver: NetworkResolver,
        max_status_bytes: int,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`ssl_context`: for `https` addresses; None verifies them with the system's certificate authorities."""
        self._keys = keys
        self._resolver = resolver
        self._max_status_bytes = max_status_bytes
        self._ssl_context = ssl_context

    async def __aenter__(self) -> WorkerClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=self._resolver, ssl=self._ssl_context or True),
            request_class=CleanRequest,
            response_class=FinalResponse,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[send_cluster_key(self._keys)],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def probe(self, address: str, timeout_s: float) -> None:
        """Check that a worker answers: `/health` with 200, or FastChat's `/worker_get_status`. Raises like
        `get_status`.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.get(f"{address}/health", timeout=timeout, allow_redirects=False) as response:
                if response.status == 200:
                    return
        except TimeoutError as error:
            raise WorkerTimeoutError(f"{address} did not answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _unreachable(address, error) from error
        await self.get_status(address, timeout_s)

    async def get_status(self, address: str, timeout_s: float | None = None) -> WorkerStatus:
        """Raises WorkerUnreachableError; WorkerTimeoutError if no answer comes in time; WorkerLostError if the answer
        is not a status; ShortageError if this process has no file or port left.
        """
        timeout_s = STATUS_TIMEOUT_S if timeout_s is None else timeout_s
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        url = f"{address}/worker_get_status"
        try:
            async with self._session.post(url, timeout=timeout, allow_redirects=False) as response:
                body = await read_bounded(response, self._max_status_bytes)
        except TimeoutError as error:
            raise WorkerTimeoutError(f"{address} did not send its status within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _unreachable(address, error) from error
        try:
            return WorkerStatus.model_validate_json(body)
        except ValidationError as error:
            raise WorkerLostError(f"{address} gave no status (HTTP {response.status})") from error

    async def generate_stream(self, address: str, body: bytes, lease: str, hops: str) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of FastChat's `/worker_generate_stream` as they come. Raises like `get_status`, and
        WorkerBrokenError.
        """
        headers = {"Content-Type": "application/json", LEASE_HEADER: lease, HOPS_HEADER: hops}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=GENERATE_SILENCE_S, sock_connect=STATUS_TIMEOUT_S)
        url = f"{address}/worker_generate_stream"
        try:
            # Bounds headers that come byte by byte, which `sock_read` does not.
            async with asyncio.timeout(GENERATE_SILENCE_S):
                response = await self._session.post(
                    url, data=body, headers=headers, timeout=timeout, allow_redirects=False
                )
            async with response:
                if response.status != 200:
                    raise WorkerLostError(f"{address} answered with HTTP {response.status}")
                async for piece in response.content.iter_any():
                    yield piece
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _unreachable(address, error) from error
        except TimeoutError as error:
            raise WorkerTimeoutError(f"{address} did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerBrokenError(f"The connection to {address} broke: {error}") from error


def _unreachable(address: str, error: Exception) -> ServiceError:
    """The error for a failed connection: the worker's failure, or a shortage of this process."""
    if is_own_shortage(error):
        return ShortageError(f"This controller has no open file or port left to reach {address}.")
    return WorkerUnreachableError(f"{address} cannot be reached: {error}")
