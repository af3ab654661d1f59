"""The HTTP session to controller and workers."""

from __future__ import annotations

import ssl
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import aiohttp

from fastserve.access.cluster_key import ClusterKeys
from fastserve.access.key_files import Reloadable
from fastserve.access.outgoing import CleanRequest, FinalResponse, send_cluster_key


class ConnectionUse:
    """Given to a request as `trace_request_ctx`, it learns whether the request went over a pooled connection.

    A pooled connection may have been closed by the other side without our having noticed yet, which says nothing
    about whether the other side is well.
    """

    def __init__(self) -> None:
        self.reused = False


def open_session(
    keys: Reloadable[ClusterKeys | None], ssl_context: ssl.SSLContext | None = None
) -> AbstractAsyncContextManager[aiohttp.ClientSession]:
    """One session for all: it sends the cluster key, limits no connections, and leaves bodies as they are.

    `ssl_context` is for `https` addresses; None verifies them with the system's authorities.
    """
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0, ssl=ssl_context or True),
        request_class=CleanRequest,
        response_class=FinalResponse,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        trace_configs=[trace, send_cluster_key(keys)],
    )


async def _note_reuse(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
    use = context.trace_request_ctx
    if isinstance(use, ConnectionUse):
        use.reused = True
