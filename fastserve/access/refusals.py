"""Middleware that refuses requests before routing: counts and logs them, and answers in the shape of the route."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import FastserveError
from fastserve.observability.logging import Throttle
from fastserve.observability.metrics import CollectorRegistry, Counter
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.errors import error_response

logger = logging.getLogger(__name__)

MIN_LOG_INTERVAL_S = 1.0
_REQUEST_ID = REQUEST_ID_HEADER.encode()
_MAX_ID_CHARS = 128


class RefusedKeys:
    """Counts requests with a wrong or missing key, and logs at most one a second, without any part of a key."""

    def __init__(self, kind: str, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        """`kind`: `api` or `cluster`, part of the metric's name."""
        self._kind = kind
        self._counter = Counter(
            f"fastserve_refused_{kind}_keys", f"Requests without a valid {kind} key.", registry=registry
        )
        self._throttle = Throttle(MIN_LOG_INTERVAL_S, clock)
        self._num_unlogged = 0

    def note(self, scope: Scope, *, has_key: bool) -> None:
        self._counter.inc()
        if not self._throttle.passes():
            self._num_unlogged += 1
            return
        client = scope.get("client")
        logger.warning(
            "Refused a request with %s: from %s, %s%s",
            f"a wrong {self._kind} key" if has_key else f"no {self._kind} key",
            client[0] if client else "an unknown address",
            f"request {_request_id(scope)}",
            f" ({self._num_unlogged} more since the last such line)" if self._num_unlogged else "",
        )
        self._num_unlogged = 0


def _request_id(scope: Scope) -> str:
    """The request id that the service set, else the client's, escaped and shortened."""
    named: str | None = scope.get("state", {}).get("request_id")
    if named is not None:
        return named
    given = next((value for name, value in scope["headers"] if name == _REQUEST_ID), None)
    return "without an id" if given is None else ascii(given[:_MAX_ID_CHARS].decode("latin-1"))


class Guard:
    """Base class of middleware that accepts or refuses requests by `check`.

    It runs before the router, so all routes are guarded, unknown ones included.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            try:
                self.check(scope)
            except FastserveError as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raises the FastserveError to answer with if the request is refused."""
        raise NotImplementedError


async def refuse(error: FastserveError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    response = error_response(error, scope)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)
