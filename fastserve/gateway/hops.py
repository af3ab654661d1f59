"""Middleware that detects loops of API servers."""

from __future__ import annotations

from typing import cast

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import LoopDetectedError
from fastserve.serving.errors import error_response
from fastserve.serving.hops import LoopGuard


class LoopGuardMiddleware:
    """Refuses requests that have passed this server before, and stores the value that `next_hops` returns.

    It runs before the check of API keys: a request that comes back carries none, and should still get the right error.
    """

    def __init__(self, app: ASGIApp, max_hops: int) -> None:
        self._app = app
        self._guard = LoopGuard("API server", max_hops)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["next_hops"] = self._guard.next_hops(scope["headers"])
            except LoopDetectedError as error:
                await error_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def next_hops(request: Request) -> str:
    """Value of HOPS_HEADER to forward this request with."""
    return cast(str, request.state.next_hops)
