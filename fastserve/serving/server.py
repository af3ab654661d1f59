"""The process: start, signals, drain, end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from fastserve.config import ServerConfig
from fastserve.errors import StartupError
from fastserve.serving.direct import DirectProtocol

logger = logging.getLogger(__name__)


class _Application:
    """The application as uvicorn sees it, with a start that can be cancelled: loading a model takes minutes."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._starting: asyncio.Task[Any] | None = None
        self._is_cancelled = False

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self._live(scope, receive, send) if scope["type"] == "lifespan" else self._app(scope, receive, send)

    def cancel_start(self) -> None:
        """From a signal handler. Does nothing once the application has started."""
        self._is_cancelled = True
        if self._starting is not None:
            self._starting.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._starting is not None:
            self._starting.cancel()

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            self._starting = None
            # A start that was cancelled failed for no reason that a traceback could tell.
            is_cancelled = self._is_cancelled and message["type"] == "lifespan.startup.failed"
            await send({"type": message["type"]} if is_cancelled else message)

        if self._is_cancelled:
            await tell({"type": "lifespan.startup.failed"})
            return
        self._starting = asyncio.current_task()
        await self._app(scope, receive, tell)


class _Server(uvicorn.Server):
    """uvicorn, with a start that signals end at once, and a farewell before the listening sockets close."""

    def __init__(
        self,
        config: uvicorn.Config,
        cancel_start: Callable[[], None],
        before_shutdown: Callable[[], Awaitable[None]] | None,
        wait_ready: Callable[[], Awaitable[None]] | None,
    ) -> None:
        super().__init__(config)
        self._wait_ready = wait_ready
        self._announcing: asyncio.Task[None] | None = None
        self._cancel_start = cancel_start
        self._before_shutdown = before_shutdown

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn only takes a note, and reads it when the application has started.
        super().handle_exit(sig, frame)
        self._cancel_start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets and self.started:
            self._announcing = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        if self._wait_ready is not None:
            await self._wait_ready()
        # uvicorn keeps quiet when it is handed bound sockets; launchers wait for this line.
        scheme = "https" if self.config.ssl_keyfile else "http"
        logger.info("Uvicorn running on %s://%s:%d", scheme, self.config.host, self.config.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        if self._before_shutdown is not None:
            await self._before_shutdown()
        await super().shutdown(sockets)


def serve(
    app: FastAPI,
    config: ServerConfig,
    sockets: list[socket.socket],
    before_shutdown: Callable[[], Awaitable[None]] | None = None,
    *,
    wait_ready: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then call `before_shutdown`, let running requests end, and return.

    The line that launchers wait for is logged when `wait_ready` has returned; requests are answered before.

    A signal that comes before the application has started cancels its lifespan, and `serve` returns when the lifespan
    has cleaned up. Raises StartupError when the application's lifespan failed.
    """
    key, certificate = _tls_files() if config.ssl else (None, None)
    application = _Application(app)
    server = _Server(
        uvicorn.Config(
            application,
            interface="asgi3",
            http=DirectProtocol,
            host=config.host,
            port=sockets[0].getsockname()[1],
            log_config=None,
            access_log=False,
            ssl_keyfile=key,
            ssl_certfile=certificate,
            timeout_graceful_shutdown=max(1, int(config.drain_timeout_s)),
            timeout_keep_alive=75,
            backlog=4096,
        ),
        application.cancel_start,
        before_shutdown,
        wait_ready,
    )
    # uvicorn raises the signal that ended it once more when all is done. By default that kills, which would make an
    # orderly end look like a crash.
    previous = signal.signal(signal.SIGTERM, _end_in_order)
    try:
        server.run(sockets=sockets)
    except (KeyboardInterrupt, _TerminatedError):
        return
    except SystemExit:
        # uvicorn's way to say that the lifespan failed.
        if server.started:
            raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    if server.started:
        return
    if server.should_exit:
        logger.info("The start was ended by a signal.")
    else:
        raise StartupError("The service could not start; the lines above say why.")


class _TerminatedError(BaseException):
    """SIGTERM, after or before uvicorn has taken care of it."""


def _end_in_order(*_: object) -> None:
    raise _TerminatedError


def _tls_files() -> tuple[str, str]:
    try:
        return os.environ["SSL_KEYFILE"], os.environ["SSL_CERTFILE"]
    except KeyError as error:
        raise StartupError(
            f"--ssl needs the environment variable {error.args[0]} (SSL_KEYFILE, SSL_CERTFILE)."
        ) from None


def run_entry(run: Callable[[], None]) -> None:
    """Run an entry's body: a StartupError becomes one line on standard error and exit code 1."""
    try:
        run()
    except StartupError as error:
        logger.error(error.message)
        sys.exit(1)
