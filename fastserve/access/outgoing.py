"""Our own requests to other services of the cluster: the key that they carry, and answers of bounded size."""

from __future__ import annotations

from types import SimpleNamespace

import aiohttp

from fastserve.access.cluster_key import ClusterKeys
from fastserve.access.key_files import Reloadable


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
