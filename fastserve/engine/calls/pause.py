"""Stop computing, and go on. Both may be called again and again; an engine that is started anew is not paused."""

from __future__ import annotations

from concurrent.futures import Future

from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import Call
from fastserve.engine.pausing import PauseMode, PauseState


class Pause(Call[PauseState], frozen=True):
    """The reply comes once nothing is computed any more. Requests that have not begun wait in the queue."""

    mode: PauseMode = "keep"
    """What becomes of requests that have begun. keep: they go on when the engine is resumed, with the blocks that they
    hold; wait: they are finished first; abort: they end with finish_reason "abort"."""


class Resume(Call[PauseState], frozen=True):
    pass


def _pause(call: Pause, context: CallContext) -> Future[PauseState]:
    return context.pausing.pause(call.mode, context.send_outputs)


def _resume(call: Resume, context: CallContext) -> PauseState:
    return context.pausing.resume()


HANDLERS = (CallHandler[Pause, PauseState](Pause, _pause), CallHandler(Resume, _resume))
