"""The worker's end of calls: sends them and awaits their replies."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import msgspec

from fastserve import errors
from fastserve.engine.contract import (
    Call,
    CallError,
    CallReply,
    CallRequest,
    PoolingResult,
    ReplyT,
    RequestOutput,
    reply_type,
)
from fastserve.errors import EngineTimeoutError, FastserveError, InternalError

_encode = msgspec.msgpack.Encoder().encode
_ERRORS: dict[str, type[FastserveError]] = {
    name: found for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, FastserveError)
}


class PendingCalls:
    """Calls in progress, for all engines."""

    def __init__(self, send: Callable[[CallRequest], None]) -> None:
        """`send` sends a call to the engine."""
        self._send = send
        self._replies: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._numbers = itertools.count()

    async def call(self, call: Call[ReplyT], timeout_s: float | None) -> ReplyT:
        """Send a call and return its reply. Raises the errors of `Engine.call`."""
        call_id, name = next(self._numbers), type(call).__name__
        reply: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        self._replies[call_id] = reply
        try:
            self._send(CallRequest(call_id, name, msgspec.Raw(_encode(call))))
            async with asyncio.timeout(timeout_s):
                raw = await reply
        except TimeoutError as error:
            raise EngineTimeoutError(
                f"The engine has not finished {name} within {timeout_s:g} s; it goes on, but the reply will be dropped."
            ) from error
        finally:
            del self._replies[call_id]
        return msgspec.msgpack.decode(raw, type=reply_type(type(call)))

    def settle(self, event: CallReply | CallError) -> None:
        """Complete a call with its reply or error. Ignored when nobody waits for it any more."""
        reply = self._replies.get(event.call_id)
        if reply is None or reply.done():
            return
        if isinstance(event, CallReply):
            reply.set_result(event.reply)
        else:
            reply.set_exception(_error_of(event))

    def fail_all(self, make_error: Callable[[], FastserveError]) -> None:
        """Fail all calls: no replies will come any more."""
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(make_error())


def refusal(output: RequestOutput | PoolingResult) -> FastserveError:
    """The error of a request that the engine refused."""
    if output.error_kind is None:
        return InternalError(f"The engine refused the request: {output.error}.")
    made: Any = _ERRORS.get(output.error_kind, InternalError)
    found: FastserveError = made(output.error)
    return found


def _error_of(event: CallError) -> FastserveError:
    error: Any = _ERRORS.get(event.kind, InternalError)(event.message)
    error.param, error.code = event.param, event.code
    found: FastserveError = error
    return found
