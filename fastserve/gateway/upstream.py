"""The HTTP session to controller and workers."""

from __future__ import annotations

import ssl
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import aiohttp


class ConnectionUse:
    """Given to a request as `trace_request_ctx`, it learns whether the request went over a pooled connection.

    A pooled connection may have been closed by the other side without our having noticed yet, which says nothing
    about whether the other side is well.
    """

    def __init__(self) -> None:
        self.reused = False


def open_session(ssl_context: ssl.SSLContext | None = None) -> AbstractAsyncContextManager[aiohttp.ClientSession]:
    """One session for all: no limit of connections, no cookies, bodies as they are on the wire.

    `ssl_context` is for `https` addresses; None verifies them with the system's authorities.
    """
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0, ssl=ssl_context or True),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        trace_configs=[trace],
    )


async def _note_reuse(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
    use = context.trace_request_ctx
    if isinstance(use, ConnectionUse):
        use.reused = True
