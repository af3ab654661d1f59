"""The guard against loops of API servers, as middleware."""

from __future__ import annotations

from typing import cast

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import LoopDetectedError
from fastserve.serving.errors import error_response
from fastserve.serving.hops import LoopGuard


class LoopGuardMiddleware:
    """Refuses requests that have been here before; `next_hops` reads what it leaves for the others.

    It stands before the keys: what comes back carries none, and the answer should still say what is wrong.
    """

    def __init__(self, app: ASGIApp, max_hops: int) -> None:
        self._app = app
        self._guard = LoopGuard("API server", max_hops)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["next_hops"] = self._guard.next_hops(scope["headers"])
            except LoopDetectedError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def next_hops(request: Request) -> str:
    """Value of HOPS_HEADER for what this request is passed on as."""
    return cast(str, request.state.next_hops)
