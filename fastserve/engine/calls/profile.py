"""Record steps with torch's profiler to the engine's own folder (--profile-dir): callers pass no paths."""

from __future__ import annotations

from typing import Annotated

import msgspec

from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import Call

MAX_PROFILE_STEPS = 200
"""Bounds memory: a trace is held in memory until it is written."""
MAX_WARM_UP_STEPS = 10_000


class ProfileTrace(msgspec.Struct, frozen=True):
    path: str
    """Path of the trace file on the worker's machine."""


class StartProfile(Call[ProfileTrace], frozen=True):
    """Start recording. The reply comes at once; the trace is written after the last step, or by `StopProfile`."""

    num_steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_PROFILE_STEPS)] = MAX_PROFILE_STEPS
    num_warm_up_steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_WARM_UP_STEPS)] = 1
    """Steps before the recorded ones: the profiler's first step is slow."""


class StopProfile(Call[ProfileTrace], frozen=True):
    """Stop recording, if the profile has not ended by itself. The reply comes when the trace is written."""


def _start(call: StartProfile, context: CallContext) -> ProfileTrace:
    return ProfileTrace(context.profiler.start(call.num_steps, call.num_warm_up_steps))


def _stop(call: StopProfile, context: CallContext) -> ProfileTrace:
    return ProfileTrace(context.profiler.stop())


HANDLERS = (CallHandler(StartProfile, _start), CallHandler(StopProfile, _stop))
