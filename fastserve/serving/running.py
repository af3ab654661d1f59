"""Running requests, and how they end when the server shuts down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.errors import ShuttingDownError
from fastserve.serving.error_shapes import shape_of
from fastserve.serving.errors import error_response

logger = logging.getLogger(__name__)

FINAL_ERROR_TIMEOUT_S = 0.5
"""Seconds until a final error event is given up because its client does not read."""


class RunningRequests:
    """Middleware that tracks running requests and can end each of them with an error.

    It must be the outermost. The application is cancelled, so that its `finally` blocks run, and the client gets a 503,
    or an error event if a stream of its route has begun. Other answers that have begun can only be cut.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = False

    def __len__(self) -> int:
        return len(self._tasks)

    async def end_all(self) -> None:
        """End all requests and refuse new ones. Returns when their clients have been answered."""
        self._is_over = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * FINAL_ERROR_TIMEOUT_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        progress = _Progress(send)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._is_over:
                raise asyncio.CancelledError
            await self._app(scope, receive, progress.send)
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            await _send_final_error(progress, scope, receive, send)
        finally:
            self._tasks.discard(task)


class _Progress:
    """Records how far an answer has been sent."""

    __slots__ = ("_send", "is_complete", "is_started", "media_type", "send")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False
        self.media_type = b""
        self.is_complete = False
        self.send = self._note  # not a coroutine function, which would cost more for each chunk of a stream

    def _note(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.is_started = True
            headers = message.get("headers", ())
            self.media_type = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        elif not message.get("more_body", False):
            self.is_complete = True
        return self._send(message)


async def _send_final_error(progress: _Progress, scope: Scope, receive: Receive, send: Send) -> None:
    error = ShuttingDownError("The server is shutting down and ended this request before it was complete.")
    try:
        async with asyncio.timeout(FINAL_ERROR_TIMEOUT_S):
            if progress.is_complete:
                return
            if not progress.is_started:
                await error_response(error, scope)(scope, receive, send)
            elif progress.media_type.startswith(shape_of(scope).stream_type):
                last = shape_of(scope).last_event(error)
                await send({"type": "http.response.body", "body": last, "more_body": False})
            else:
                logger.warning("%s %s was cut by the end of the drain", scope["method"], scope["path"])
    except TimeoutError:
        logger.info("a client did not read the end of its answer")
