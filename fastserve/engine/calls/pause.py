"""Pause and resume computing. Both may be repeated; an engine starts unpaused."""

from __future__ import annotations

from concurrent.futures import Future

from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import Call
from fastserve.engine.pausing import PauseMode, PauseState


class Pause(Call[PauseState], frozen=True):
    """Stop computing. The reply comes once no step is computed any more; requests that have not begun stay queued."""

    mode: PauseMode = "keep"
    """For requests that have begun. keep: they keep their blocks and go on when the engine is resumed; wait: they are
    finished first; abort: they end with finish_reason "abort"."""


class Resume(Call[PauseState], frozen=True):
    pass


def _pause(call: Pause, context: CallContext) -> Future[PauseState]:
    return context.pausing.pause(call.mode, context.send_outputs)


def _resume(call: Resume, context: CallContext) -> PauseState:
    return context.pausing.resume()


HANDLERS = (CallHandler[Pause, PauseState](Pause, _pause), CallHandler(Resume, _resume))
