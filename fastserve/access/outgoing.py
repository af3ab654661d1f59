"""Our own requests to other services of the cluster: the key that they carry, and bounds on what comes back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aiohttp

from fastserve.access.cluster_key import ClusterKeys
from fastserve.access.key_files import Reloadable

MAX_INTERIM_ANSWERS = 16
"""Answers with a status below 200 before the one that counts."""


class CleanRequest(aiohttp.ClientRequest):
    """Goes over connections that are silent before it only: what has come already is no answer to it, but perhaps a
    second one to another client's request.
    """

    async def send(self, conn: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        if conn.protocol is not None and conn.protocol.should_close:
            raise aiohttp.ServerDisconnectedError("The other side spoke without having been asked.")
        return await super().send(conn)


class FinalResponse(aiohttp.ClientResponse):
    """Waits for the answer behind interim ones, of which aiohttp would take as many as come."""

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
    """For `ClientSession(trace_configs=[...])`: each request carries the key that is current when it starts."""

    async def add_key(_: aiohttp.ClientSession, __: SimpleNamespace, request: aiohttp.TraceRequestStartParams) -> None:
        if keys.value is not None:
            request.headers.update(keys.value.authorization())

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(add_key)
    return trace


async def read_bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The answer's body, or b"" when it is longer than `max_bytes`: the connection is closed then."""
    pieces = []
    num_bytes = 0
    async for piece in response.content.iter_any():
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            response.close()
            return b""
        pieces.append(piece)
    return b"".join(pieces)
