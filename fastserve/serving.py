"""What every HTTP process of fastserve does alike: bind, serve, drain, answer errors, stream, notice a client gone.

The port is bound before anything slow happens, so a port in use ends the start at once; requests are accepted (and
"Uvicorn running on" is logged) when the application's lifespan has started.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from fastserve.config import ServerConfig
from fastserve.errors import FastserveError, InternalError, InvalidRequestError, StartupError

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")

# ---- the process ------------------------------------------------------------------------------------------------


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind (not listen) every address that `host` resolves to; families that the machine lacks are passed over.

    Raises StartupError when the port is taken or no address can be bound. With port 0, all addresses share one port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartupError(f"--host {host}: the name cannot be resolved ({error.strerror}).") from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, address in sorted(set(found), key=lambda row: row[0] != socket.AF_INET):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
        except OSError as error:
            sock.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing = error
                continue
            for other in sockets:
                other.close()
            if error.errno == errno.EADDRINUSE:
                raise StartupError(
                    f"Port {port} on {host} is in use by another program: stop it, or choose another port with --port."
                ) from error
            raise StartupError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
        sockets.append(sock)
        port = sock.getsockname()[1]
    if not sockets:
        raise StartupError(f"--host {host}: this machine has no such address ({missing}).")
    return sockets


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
    ) -> None:
        super().__init__(config)
        self._cancel_start = cancel_start
        self._before_shutdown = before_shutdown

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn only takes a note, and reads it when the application has started.
        super().handle_exit(sig, frame)
        self._cancel_start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets and self.started:
            # uvicorn keeps quiet when it is handed bound sockets; launchers wait for this line.
            scheme = "https" if self.config.ssl_keyfile else "http"
            logger.info("Uvicorn running on %s://%s:%d", scheme, self.config.host, self.config.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._before_shutdown is not None:
            await self._before_shutdown()
        await super().shutdown(sockets)


def serve(
    app: FastAPI,
    config: ServerConfig,
    sockets: list[socket.socket],
    before_shutdown: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then call `before_shutdown`, let running requests end, and return.

    A signal that comes before the application has started cancels its lifespan, and `serve` returns when the lifespan
    has cleaned up. Raises StartupError when the application's lifespan failed.
    """
    key, certificate = _tls_files() if config.ssl else (None, None)
    application = _Application(app)
    server = _Server(
        uvicorn.Config(
            application,
            interface="asgi3",
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


def advertised_address(host: str, port: int, *, ssl: bool = False) -> str:
    """The address under which others reach a server that listens on `host`; a wildcard becomes the machine's own."""
    if host in ("0.0.0.0", "::", ""):
        host = _own_address()
    if ":" in host:
        host = f"[{host}]"
    return f"{'https' if ssl else 'http'}://{host}:{port}"


def _own_address() -> str:
    # Connecting a datagram socket sends nothing; it only asks the kernel which of our addresses leads outside.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"


# ---- errors -----------------------------------------------------------------------------------------------------


def error_response(error: FastserveError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def install_error_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape, whoever raised it."""

    async def ours(_: Request, error: Exception) -> Response:
        return error_response(error if isinstance(error, FastserveError) else InternalError(str(error)))

    async def invalid(_: Request, error: Exception) -> Response:
        problems = error.errors() if isinstance(error, RequestValidationError) else []
        return error_response(_explain(problems))

    async def http(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        named = InvalidRequestError(str(getattr(error, "detail", error)), code=f"http_{status}")
        headers = error.headers if isinstance(error, HTTPException) else None
        return JSONResponse(named.body(), status_code=status, headers=headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(InternalError("The server failed on this request; its log has the cause."))

    app.add_exception_handler(FastserveError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(404, http)
    app.add_exception_handler(405, http)
    app.add_exception_handler(Exception, unexpected)


def _explain(problems: Any) -> InvalidRequestError:
    """The first of pydantic's findings, as a sentence that names field, value and remedy."""
    if not problems:
        return InvalidRequestError("The request body is not valid.")
    first = problems[0]
    path = [str(part) for part in first.get("loc", ()) if part != "body"]
    name = ".".join(path) or "body"
    if first.get("type") == "missing":
        return InvalidRequestError(f"Missing required field '{name}'.", param=name, code="missing_required_parameter")
    if first.get("type") == "json_invalid":
        return InvalidRequestError(f"The request body is not valid JSON: {first.get('ctx', {}).get('error', '')}.")
    value = repr(first.get("input"))
    shown = value if len(value) <= 80 else value[:77] + "..."
    return InvalidRequestError(f"Invalid value for '{name}': {shown}. {first.get('msg', '')}.", param=name)


# ---- answers ----------------------------------------------------------------------------------------------------


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT | None:
    """Await `work`; cancel it and return None when the client goes away first. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for pending in (task, gone):
            if not pending.done():
                pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class StreamResponse(Response):
    """A streamed body that is closed, with its `finally` blocks run, at once when the client goes away.

    `body` is an async generator of bytes. Headers leave with the first piece, so an error that it raises before that
    still becomes a proper HTTP error; after it, the generator itself has to write its error event.
    """

    def __init__(self, body: AsyncGenerator[bytes, None], media_type: str = "text/event-stream") -> None:
        super().__init__(None, media_type=media_type)
        self._body = body
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_wait_disconnect(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            for task in (pump, gone):
                if not task.done():
                    task.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._body) as body:
            started = False
            async for piece in body:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            if not started:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
