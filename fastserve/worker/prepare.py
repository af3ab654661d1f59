"""From a request to its job, for all routes that generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from fastserve.openai.routes import ModelRoute
from fastserve.worker.caller import Caller, caller_of, read_body
from fastserve.worker.grammars import preparing_bytes
from fastserve.worker.runtime import Runtime, metrics_of, runtime_of

MadeT = TypeVar("MadeT")


async def prepare(
    request: Request, route: ModelRoute, make: Callable[[Runtime, bytes, Caller], MadeT], body: bytes | None = None
) -> tuple[Runtime, MadeT]:
    """Read the body and make a job of it, in a thread if that may take long. Refusals are counted, also while the model
    loads. `body`: if it has been read. Raises FastserveError, also if the model does not generate."""
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        runtime.require_generation(route)
        received = await read_body(request) if body is None else body
        return runtime, await runtime.pool.run(preparing_bytes(received), lambda: make(runtime, received, caller))
