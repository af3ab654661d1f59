"""Endpoints that take one JSON message and answer with another, with little overhead.

Thousands of heartbeats, `/acquire` and `/release` come each second. FastAPI and the router would cost more than the
answer, so `DirectRoutes` bypasses them, and a connection that repeats the same request bypasses the application's
middlewares too (`serving/direct.py`).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.control.metrics import ControlMetrics
from fastserve.errors import FastserveError, InvalidRequestError
from fastserve.observability.logging import Throttle
from fastserve.observability.text import printable
from fastserve.serving.direct import offer_direct_answers
from fastserve.serving.errors import error_response
from fastserve.serving.messages import MessageT, parse_message

logger = logging.getLogger(__name__)

BAD_MESSAGE_LOG_INTERVAL_S = 5.0


class MessageEndpoint(Generic[MessageT]):
    """An ASGI application.

    `answer` gets the parsed message and the request's scope. It returns JSON, or None if it would have to wait; then
    `answer_later` is called. A FastserveError that they raise becomes the answer. With `is_routine` (nobody waits for
    the answer) other messages are answered first.
    """

    def __init__(
        self,
        kind: type[MessageT],
        metrics: ControlMetrics,
        answer: Callable[[MessageT, Scope], bytes | None],
        answer_later: Callable[[MessageT, Scope], Awaitable[bytes]] | None = None,
        *,
        is_routine: bool = False,
    ) -> None:
        self._kind = kind
        self._metrics = metrics
        self._answer = answer
        self._answer_later = answer_later
        self._is_routine = is_routine
        self._throttle = Throttle(BAD_MESSAGE_LOG_INTERVAL_S, time.monotonic)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(receive)
            if body is None:
                return
            message = self._parse(body, scope)
            answer = self._answer(message, scope)
            if answer is None:
                assert self._answer_later is not None
                answer = await self._answer_later(message, scope)
        except FastserveError as error:
            await error_response(error, scope)(scope, receive, send)
            return
        answer_directly = functools.partial(self._answer_directly, scope)
        offer_direct_answers(scope, answer_directly, is_routine=self._is_routine)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _answer_directly(self, scope: Scope, body: bytes) -> bytes | None:
        """None also on errors: `__call__` then raises and reports them."""
        try:
            return self._answer(self._kind.model_validate_json(body), scope)
        except (ValueError, FastserveError):
            return None

    def _parse(self, body: bytes, scope: Scope) -> MessageT:
        try:
            return parse_message(self._kind, body)
        except InvalidRequestError as error:
            self._metrics.bad_messages.inc()
            if self._throttle.passes():
                host = (scope.get("client") or ("an unknown address",))[0]
                logger.warning("A message from %s to %s is refused: %s", host, scope["path"], printable(error.message))
            raise


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; None if the client has disconnected."""
    pieces: list[bytes] = []
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


class DirectRoutes:
    """Middleware: passes POST requests to these paths to their endpoints, and all others to the application."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, ASGIApp]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (endpoint or self._app)(scope, receive, send)
