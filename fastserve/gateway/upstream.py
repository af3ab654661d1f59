"""The HTTP session for requests to the controller and the workers."""

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
    """Passed to a request as `trace_request_ctx`; records whether the request used a pooled connection.

    The other side may have closed a pooled connection without our having noticed yet. A failure of such a connection
    does not mean that the other side is down.
    """

    def __init__(self) -> None:
        self.reused = False


def open_session(
    keys: Reloadable[ClusterKeys | None], ssl_context: ssl.SSLContext | None = None
) -> AbstractAsyncContextManager[aiohttp.ClientSession]:
    """A session that sends the cluster key, does not limit the number of connections, and does not decompress bodies.

    `ssl_context`: for `https` addresses; None verifies them with the system's certificate authorities.
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
