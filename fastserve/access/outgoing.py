"""Requests to other services of the cluster: they send the cluster key and bound the answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aiohttp

from fastserve.access.cluster_key import ClusterKeys
from fastserve.access.key_files import Reloadable

MAX_INTERIM_ANSWERS = 16
"""Interim answers (1xx) accepted before the final one."""


class CleanRequest(aiohttp.ClientRequest):
    """Uses only connections without unread bytes. Those cannot be its answer; they may be a second answer to another
    client's request.
    """

    async def send(self, conn: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        if conn.protocol is not None and conn.protocol.should_close:
            raise aiohttp.ServerDisconnectedError("The other side sent data before the request.")
        return await super().send(conn)


class FinalResponse(aiohttp.ClientResponse):
    """Accepts at most MAX_INTERIM_ANSWERS interim answers before the final one; aiohttp has no such bound."""

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        assert protocol is not None
        read, num_left = protocol.read, MAX_INTERIM_ANSWERS + 1

        async def read_one_of_few() -> Any:
            nonlocal num_left
            num_left -= 1
            if num_left < 0:
                raise aiohttp.ClientPayloadError(f"More than {MAX_INTERIM_ANSWERS} interim answers came.")
            return await read()

        protocol.read = read_one_of_few  # type: ignore[method-assign]
        try:
            return await super().start(connection)
        finally:
            protocol.read = read  # type: ignore[method-assign]


def send_cluster_key(keys: Reloadable[ClusterKeys | None]) -> aiohttp.TraceConfig:
    """For `ClientSession(trace_configs=[...])`: adds the current key to each request that has no key of its own.

    The administrator's key is the only other one: a client's API key is never sent on.
    """

    async def add_key(_: aiohttp.ClientSession, __: SimpleNamespace, request: aiohttp.TraceRequestStartParams) -> None:
        if keys.value is not None and "Authorization" not in request.headers:
            request.headers.update(keys.value.authorization())

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(add_key)
    return trace


async def read_bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The answer's body; b"" if it is longer than `max_bytes`, and the connection is closed then."""
    chunks = []
    num_bytes = 0
    async for chunk in response.content.iter_any():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            response.close()
            return b""
        chunks.append(chunk)
    return b"".join(chunks)
