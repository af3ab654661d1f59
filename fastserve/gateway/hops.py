"""Loops: an API server that stands among its own controller's workers would hand a request to itself for ever.

Each API server has an id, made at its start, and adds it to the header HOPS_HEADER of what it passes on. A request that
carries the server's own id has been here before. The number of ids is bounded too, for loops through strangers that
pass the header on, and for chains that are longer than anybody means.
"""

from __future__ import annotations

from typing import cast

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import LoopDetectedError
from fastserve.protocol import HOPS_HEADER
from fastserve.serving.errors import error_response

NAME = HOPS_HEADER.encode()


class LoopGuardMiddleware:
    """Refuses requests that have been here before; `next_hops` reads what it leaves for the others.

    It stands before the keys: what comes back carries none, and the answer should still say what is wrong.
    """

    def __init__(self, app: ASGIApp, server_id: str, max_hops: int) -> None:
        self._app = app
        self._server_id = server_id
        self._max_hops = max_hops

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            value = next((value for name, value in scope["headers"] if name == NAME), b"").decode("latin-1")
            passed = [part.strip() for part in value.split(",", self._max_hops + 1)] if value else []
            if self._server_id in passed:
                await self._refuse("This API server has got back a request that it had passed on", scope, receive, send)
                return
            if len(passed) >= self._max_hops:
                problem = f"The request has passed through more than {self._max_hops} API servers"
                await self._refuse(problem, scope, receive, send)
                return
            scope.setdefault("state", {})["next_hops"] = ",".join([*passed, self._server_id])
        await self._app(scope, receive, send)

    async def _refuse(self, problem: str, scope: Scope, receive: Receive, send: Send) -> None:
        error = LoopDetectedError(f"{problem}: a worker is registered with an API server's address.")
        await error_response(error)(scope, receive, send)


def next_hops(request: Request) -> str:
    """Value of HOPS_HEADER for what this request is passed on as."""
    return cast(str, request.state.next_hops)
