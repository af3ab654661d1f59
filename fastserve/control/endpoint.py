"""Endpoints that take one JSON message and answer with another, and the shortest way to them.

Heartbeats, `/acquire` and `/release` come by the thousand each second, so they pass neither FastAPI's machinery nor the
router, which would cost more than the answer: `DirectRoutes` stands right behind the application's middlewares.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.control.metrics import ControlMetrics
from fastserve.errors import FastserveError, InvalidRequestError
from fastserve.observability.logging import Throttle
from fastserve.observability.text import printable
from fastserve.serving.errors import error_response
from fastserve.serving.messages import MessageT, parse_message

logger = logging.getLogger(__name__)

BAD_MESSAGE_LOG_INTERVAL_S = 5.0


class MessageEndpoint(Generic[MessageT]):
    """An ASGI application. `handle` gets the parsed message and returns JSON; what it raises becomes an answer too."""

    def __init__(
        self, kind: type[MessageT], handle: Callable[[MessageT, Request], Awaitable[bytes]], metrics: ControlMetrics
    ) -> None:
        self._kind = kind
        self._handle = handle
        self._metrics = metrics
        self._throttle = Throttle(BAD_MESSAGE_LOG_INTERVAL_S, time.monotonic)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(receive)
            if body is None:
                return
            answer = await self._handle(self._parse(body, scope), Request(scope, receive))
        except FastserveError as error:
            await error_response(error)(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _parse(self, body: bytes, scope: Scope) -> MessageT:
        try:
            return parse_message(self._kind, body)
        except InvalidRequestError as error:
            self._metrics.bad_messages.inc()
            if self._throttle.passes():
                host = (scope.get("client") or ("an unknown address",))[0]
                logger.warning("A message from %s to %s is refused: %s", host, scope["path"], printable(error.message))
            raise


async def read_body(receive: Receive) -> bytes | None:
    """The whole body, or None when the client has gone."""
    message: Any = await receive()
    if message["type"] == "http.disconnect":
        return None
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        return body
    pieces = [body]
    while message.get("more_body", False):
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
    return b"".join(pieces)


class DirectRoutes:
    """Middleware: POST requests to these paths go straight to their endpoints, all others on to the application."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, ASGIApp]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (endpoint or self._app)(scope, receive, send)
