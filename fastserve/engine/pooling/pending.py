"""The worker's end of pooling requests: sends them and awaits their results. For all engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastserve.engine.calls.pending import refusal
from fastserve.engine.contract import PoolingRequest, PoolingResult
from fastserve.errors import EngineDeadError


class PendingPooling:
    def __init__(self, send: Callable[[PoolingRequest], None], abort: Callable[[str], None]) -> None:
        """`abort` gets the id of a request that nobody waits for any more."""
        self._send = send
        self._abort = abort
        self._results: dict[str, asyncio.Future[PoolingResult]] = {}

    async def pool(self, request: PoolingRequest) -> PoolingResult:
        """Raises the errors of `Engine.pool`."""
        result: asyncio.Future[PoolingResult] = asyncio.get_running_loop().create_future()
        self._results[request.request_id] = result
        try:
            self._send(request)
            found = await result
        finally:
            del self._results[request.request_id]
            if result.cancelled():
                self._abort(request.request_id)
        if found.error is not None:
            raise refusal(found)
        return found

    def settle(self, result: PoolingResult) -> None:
        """Complete a request. Ignored when nobody waits for it any more."""
        waiting = self._results.get(result.request_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(result)

    def fail_all(self, reason: str) -> None:
        """Fail all requests: the engine has died or is closed."""
        for result in self._results.values():
            if not result.done():
                result.set_exception(EngineDeadError(reason))
