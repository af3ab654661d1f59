"""The server process: start, signals, drain, exit."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Collection
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.config import ServerConfig
from fastserve.errors import StartupError
from fastserve.serving.accepting import BACKLOG, Listener, listen
from fastserve.serving.bounds import BodyBounds, MemoryGuard, MemoryMeter
from fastserve.serving.connection import BoundedProtocol, ConnectionLimits, ConnectionTable, connection_limits
from fastserve.serving.direct import MAX_DIRECT_BYTES, DirectProtocol, DirectQueue
from fastserve.serving.handshakes import HandshakeAcceptor
from fastserve.serving.listen import url_of
from fastserve.serving.running import RunningRequests
from fastserve.serving.shortage import raise_file_limit
from fastserve.serving.tls import server_ssl_context

logger = logging.getLogger(__name__)

HARD_EXIT_S = 0.8
"""Seconds within which the process ends after a second signal, whatever it is doing."""
POLL_S = 0.05
FLUSH_S = 0.5
"""Seconds that the last bytes of answers may take to be sent at the end of a drain."""


class _Lifespan:
    """The application's lifespan, with a cancellable start, as loading a model takes minutes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._starting: asyncio.Task[Any] | None = None
        self._is_cancelled = False

    def cancel_start(self) -> None:
        """Cancel the start; called by a signal handler. Does nothing once the application has started."""
        self._is_cancelled = True
        if self._starting is not None:
            self._starting.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._starting is not None:
            self._starting.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def note_start(message: Message) -> None:
            self._starting = None
            # The start was cancelled on purpose, so a traceback would not help.
            is_cancelled = self._is_cancelled and message["type"] == "lifespan.startup.failed"
            await send({"type": message["type"]} if is_cancelled else message)

        if self._is_cancelled:
            await note_start({"type": "lifespan.startup.failed"})
            return
        self._starting = asyncio.current_task()
        await self._app(scope, receive, note_start)


class _Application:
    """The application inside the middleware that all services share."""

    def __init__(self, app: FastAPI, config: ServerConfig, vital_paths: Collection[str]) -> None:
        self.lifespan = _Lifespan(app)
        bounded = BodyBounds(
            app,
            config.max_body_bytes,
            config.max_buffered_bytes,
            config.max_long_body_bytes_per_s,
            time.monotonic,
        )
        guarded = MemoryGuard(bounded, MemoryMeter(config.memory_high_mark, time.monotonic), vital_paths)
        self.requests = RunningRequests(guarded)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "lifespan":
            return self.lifespan(scope, receive, send)
        if scope["method"] == "HEAD":
            # The connection does not send the body.
            scope = {**scope, "method": "GET"}
        return self.requests(scope, receive, send)


class _Connection(DirectProtocol, BoundedProtocol):
    """A bounded connection with direct answers."""

    def _is_free(self) -> bool:
        return self.is_idle and super()._is_free()


class _Server(uvicorn.Server):
    """uvicorn's server with bounded connections and a drain that answers each client before the process ends."""

    def __init__(
        self,
        config: uvicorn.Config,
        application: _Application,
        limits: ConnectionLimits,
        max_body_bytes: int,
        ssl_context: ssl.SSLContext | None,
        drain_timeout_s: float,
        before_shutdown: Callable[[], Awaitable[None]] | None,
        wait_ready: Callable[[], Awaitable[None]] | None,
    ) -> None:
        super().__init__(config)
        self._application = application
        self._ssl_context = ssl_context
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._drain_timeout_s = drain_timeout_s
        self._wait_ready = wait_ready
        self._announcing: asyncio.Task[None] | None = None
        self._before_shutdown = before_shutdown
        self._table: ConnectionTable | None = None
        self._acceptor: HandshakeAcceptor | None = None
        """Used in place of the listeners with TLS."""
        self._listeners: list[Listener] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and not self.force_exit:
            self.force_exit = True
            _begin_hard_exit()
        # uvicorn only sets a flag, which it reads after the application has started.
        super().handle_exit(sig, frame)
        self._application.lifespan.cancel_start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets, "services are handed bound sockets"
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(1)
        loop = asyncio.get_running_loop()
        table = self._table = ConnectionTable(self._limits, loop)
        direct_queue = DirectQueue(loop)

        def make_protocol() -> _Connection:
            connection = _Connection(self.config, self.server_state, self.lifespan.state, table)
            connection.direct_queue = direct_queue
            connection.max_direct_bytes = min(self._max_body_bytes, MAX_DIRECT_BYTES)
            return connection

        if self._ssl_context is None:
            self._listeners = await listen(sockets, make_protocol, table)
        else:
            self._acceptor = HandshakeAcceptor(
                make_protocol,
                self._ssl_context,
                max_handshakes=self._limits.max_handshakes,
                timeout_s=self._limits.head_timeout_s,
            )
            for sock in sockets:
                self._acceptor.listen(sock, BACKLOG)
        # Objects made so far live as long as the process. Frozen, they do not make garbage collections slow.
        gc.collect()
        gc.freeze()
        self.started = True
        self._announcing = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        if self._wait_ready is not None:
            await self._wait_ready()
        # The launcher waits for this line.
        has_tls = self._ssl_context is not None
        logger.info("Uvicorn running on %s", url_of(self.config.host, self.config.port, ssl=has_tls))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("Shutting down")
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        if self._before_shutdown is not None:
            await self._until_second_signal(self._before_shutdown())
        for listener in self._listeners:
            listener.close()
        if self._acceptor is not None:
            await self._acceptor.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        requests = self._application.requests
        if requests and not self.force_exit:
            logger.info("waiting up to %g s for %d running requests", self._drain_timeout_s, len(requests))
            await self._until_second_signal(self._wait_for(lambda: not requests, self._drain_timeout_s))
        if self.force_exit:
            logger.warning("a second signal came: ending at once")
        if requests:
            logger.warning("the drain is over: %d running requests are ended", len(requests))
        await requests.end_all()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._wait_for(lambda: not self.server_state.connections, FLUSH_S)
        if self._table is not None:
            self._table.abort_all()
            self._table.close()
        await self.lifespan.shutdown()

    async def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110 - uvicorn's sets wake nobody
            await asyncio.sleep(POLL_S)

    async def _until_second_signal(self, work: Awaitable[None]) -> None:
        """Await `work`, or cancel it when a second signal comes."""
        task = asyncio.ensure_future(work)
        try:
            # uvicorn's signal handler only sets a flag, so it is polled.
            while not task.done() and not self.force_exit:
                await asyncio.wait({task}, timeout=POLL_S)
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _begin_hard_exit() -> None:
    """Let the system kill this process after HARD_EXIT_S, even if it hangs. Safe in a signal handler."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, HARD_EXIT_S)
    else:  # Windows
        os._exit(1)


def _cancel_hard_exit() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def serve(
    app: FastAPI,
    config: ServerConfig,
    sockets: list[socket.socket],
    before_shutdown: Callable[[], Awaitable[None]] | None = None,
    *,
    wait_ready: Callable[[], Awaitable[None]] | None = None,
    vital_paths: Collection[str] = (),
) -> None:
    """Serve until SIGTERM or SIGINT, then call `before_shutdown`, let running requests finish, and return.

    The line that the launcher waits for is logged after `wait_ready` has returned; requests are answered before that.

    Requests that still run after `config.drain_timeout_s` get a 503 or, in event streams, an error event. A second
    signal ends the process at once. A signal before the application has started cancels its lifespan, and `serve`
    returns when the lifespan has cleaned up. `vital_paths` are served even when memory is short.

    Raises StartupError if a TLS file is missing or invalid, or if the application's lifespan failed.
    """
    ssl_context = server_ssl_context(config)
    raise_file_limit()
    application = _Application(app, config, vital_paths)
    uvicorn_config = uvicorn.Config(
        application,
        interface="asgi3",
        host=config.host,
        port=sockets[0].getsockname()[1],
        http=_Connection,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=max(1, round(config.keep_alive_timeout_s)),
    )
    limits = connection_limits(config)
    server = _Server(
        uvicorn_config,
        application,
        limits,
        config.max_body_bytes,
        ssl_context,
        config.drain_timeout_s,
        before_shutdown,
        wait_ready,
    )
    # uvicorn raises its signal again at the end. The default handler would kill the process, so that an orderly exit
    # would look like a crash.
    previous = signal.signal(signal.SIGTERM, _end_in_order)
    try:
        server.run(sockets=sockets)
    except (KeyboardInterrupt, _TerminatedError):
        return
    except SystemExit:
        # uvicorn exits so if the lifespan failed.
        if server.started:
            raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        _cancel_hard_exit()
    if server.started:
        return
    if server.should_exit:
        logger.info("The start was ended by a signal.")
    else:
        raise StartupError("The service could not start; the lines above say why.")


class _TerminatedError(BaseException):
    """SIGTERM, before or after uvicorn's own handling."""


def _end_in_order(*_: object) -> None:
    raise _TerminatedError


def run_entry(run: Callable[[], None]) -> None:
    """Run an entry point: a StartupError becomes its message on standard error and its exit code."""
    try:
        run()
    except StartupError as error:
        logger.error(error.message)
        sys.exit(error.exit_code)
