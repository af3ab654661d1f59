"""Give memory back to the system while nobody is served, and take it back."""

from __future__ import annotations

from concurrent.futures import Future

from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import Call
from fastserve.engine.occupation import MEMORY_TAGS, MemoryState, MemoryTag


class ReleaseMemory(Call[MemoryState], frozen=True):
    """Requests wait until the memory is back; while the weights are released, new ones are refused.

    Raises ConflictError while requests run in an engine that is not paused, or while weights are updated, and
    UnsupportedCapabilityError.
    """

    tags: tuple[MemoryTag, ...] = MEMORY_TAGS


class ResumeMemory(Call[MemoryState], frozen=True):
    """Take memory back. Weights are read from the model's folder, if no update has brought all of them meanwhile."""

    tags: tuple[MemoryTag, ...] = MEMORY_TAGS


def _release(call: ReleaseMemory, context: CallContext) -> MemoryState:
    return context.occupation.release(call.tags)


def _resume(call: ResumeMemory, context: CallContext) -> MemoryState | Future[MemoryState]:
    return context.occupation.resume(call.tags, context.send_outputs)


HANDLERS = (
    CallHandler(ReleaseMemory, _release),
    CallHandler[ResumeMemory, MemoryState](ResumeMemory, _resume),
)
