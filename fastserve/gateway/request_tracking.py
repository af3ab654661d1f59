"""Middleware that gives each request an id and records it in the metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.gateway.metrics import GatewayMetrics
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.error_shapes import ANTHROPIC_ERRORS, shape_of
from fastserve.serving.request_ids import read_request_id

CLIENT_GONE = 499
OTHER = "other"
"""Label of paths without a route."""


class RequestTrackingMiddleware:
    """Gives each request an id (the client's own, if valid), returns it in a header, and records request metrics."""

    def __init__(
        self, app: ASGIApp, metrics: GatewayMetrics, routes: Sequence[BaseRoute], clock: Callable[[], float]
    ) -> None:
        """`routes`: the application's routes, for the labels of metrics."""
        self._app = app
        self._metrics = metrics
        self._clock = clock
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._paths = {route.path for route in self._routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = read_request_id(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id
        headers = [(REQUEST_ID_HEADER.encode(), request_id.encode())]
        if shape_of(scope) is ANTHROPIC_ERRORS:
            headers.append((b"request-id", request_id.encode()))
        status = CLIENT_GONE
        complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        started_at = self._clock()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Answered outside of all middleware (see `name_failures`).
            status, complete = 500, True
            raise
        finally:
            route = self._label(scope["path"])
            self._metrics.requests.labels(route, str(status if complete else CLIENT_GONE)).inc()
            self._metrics.duration.labels(route).observe(self._clock() - started_at)

    def _label(self, path: str) -> str:
        """The route's path pattern, so that the number of labels is bounded."""
        if path in self._paths:
            return path
        return next((route.path_format for route in self._routes if route.path_regex.match(path)), OTHER)


def name_failures(app: FastAPI) -> None:
    """Add the request id to answers for unexpected exceptions too: they are sent outside of all middleware."""
    answer = cast(Callable[[Request, Exception], Awaitable[Response]], app.exception_handlers[Exception])

    async def answer_with_id(request: Request, error: Exception) -> Response:
        response = await answer(request, error)
        response.headers[REQUEST_ID_HEADER] = request.state.request_id
        return response

    app.add_exception_handler(Exception, answer_with_id)
