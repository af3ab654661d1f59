"""Serves our applications inside the event loop of a test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp


async def until(condition: Callable[[], Any], timeout: float = 5.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serve_app(app: ASGIApp, sockets: Sequence[socket.socket] = ()) -> AsyncIterator[str]:
    """Serve on loopback in this event loop, without uvicorn's signal handlers and ticks; yields the base address."""
    owned = list(sockets) or [socket.create_server(("127.0.0.1", 0))]
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=owned)
    try:
        yield f"http://127.0.0.1:{owned[0].getsockname()[1]}"
    finally:
        # Clients have usually disconnected by now. uvicorn waits for the others, and for 0.1 s even without any.
        try:
            await until(lambda: not server.server_state.connections, timeout=0.05)
        except TimeoutError:
            await server.shutdown(sockets=owned)
        else:
            for listening in server.servers:
                listening.close()
            await server.lifespan.shutdown()
        for sock in owned:
            sock.close()
