"""Memory that an engine gives back to the system while it serves nobody. No torch here.

The addresses stay, so that what knows them stays valid: pages are dropped, and come back when they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal, Protocol

import msgspec

from fastserve.engine.contract import RequestOutput
from fastserve.engine.pausing import Pausing
from fastserve.engine.updating import WeightUpdates
from fastserve.engine.weight_messages import DEFAULT_VERSION, FromDisk, UpdateOptions, WeightUpdate
from fastserve.errors import ConflictError, UnsupportedCapabilityError

MemoryTag = Literal["kv_cache", "weights"]
MEMORY_TAGS: tuple[MemoryTag, ...] = ("kv_cache", "weights")


class MemoryState(msgspec.Struct, frozen=True):
    """The reply to releasing memory and to taking it back."""

    success: bool
    message: str
    released: list[MemoryTag]
    """Tags of the memory that is released now."""
    num_bytes: int = msgspec.field(default=0, name="bytes")
    """Address space whose pages this call has given back."""
    num_preempted: int = 0
    """Requests of a paused engine that are computed anew."""


class EngineMemory(Protocol):
    def refusal(self, tag: MemoryTag) -> str | None:
        """Why this memory cannot be given back; None: it can."""
        ...

    def release(self, tag: MemoryTag) -> int:
        """Give the memory back, and return how many bytes; no step may be in flight."""
        ...


class NoMemory:
    """The memory of an engine without a model."""

    def refusal(self, tag: MemoryTag) -> str | None:
        return None

    def release(self, tag: MemoryTag) -> int:
        return 0


class CacheReset(Protocol):
    @property
    def num_preempted(self) -> int: ...


class CacheOwner(Protocol):
    """The part of a scheduler that this needs (see scheduler.Scheduler)."""

    @property
    def num_begun(self) -> int: ...

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> CacheReset: ...


class Occupation:
    """Which memory is released. Called by the engine's thread, between two steps with none in flight."""

    def __init__(
        self, scheduler: CacheOwner, pausing: Pausing, updates: WeightUpdates, memory: EngineMemory, model_dir: str
    ) -> None:
        """`model_dir`: the checkpoint from which released weights come back."""
        self._scheduler = scheduler
        self._pausing = pausing
        self._updates = updates
        self._memory = memory
        self._model_dir = model_dir
        self._has_cache = True

    @property
    def released(self) -> list[MemoryTag]:
        has = {"kv_cache": self._has_cache, "weights": not self._updates.is_released}
        return [tag for tag in MEMORY_TAGS if not has[tag]]

    def release(self, tags: Sequence[MemoryTag]) -> MemoryState:
        """Have requests wait until the memory is back. Raises ConflictError while requests run in an engine that is not
        paused, or for weights that are being updated, and UnsupportedCapabilityError; nothing is released then."""
        for tag in tags:
            reason = self._memory.refusal(tag)
            if reason is not None:
                raise UnsupportedCapabilityError(f"{tag}: {reason}", param="tags")
        if self._scheduler.num_begun and not self._pausing.is_paused:
            raise ConflictError(
                f"{self._scheduler.num_begun} requests are running: wait until they have ended, or call "
                "/pause_generation first."
            )
        num_bytes = num_preempted = 0
        if "weights" in tags and not self._updates.is_released:
            self._updates.release()
            num_bytes += self._memory.release("weights")
        if "kv_cache" in tags and self._has_cache:
            num_preempted = self._scheduler.reset_prefix_cache(reset_running_requests=True).num_preempted
            self._pausing.stop()
            self._has_cache = False
            num_bytes += self._memory.release("kv_cache")
        return MemoryState(True, "released", self.released, num_bytes, num_preempted)

    def resume(
        self, tags: Sequence[MemoryTag], send: Callable[[list[RequestOutput]], None]
    ) -> MemoryState | Future[MemoryState]:
        """Take memory back. Weights that no update has brought meanwhile are read from the model's folder. Raises
        ConflictError while an update runs."""
        reading = None
        if "weights" in tags and self._updates.is_released:
            source = FromDisk(self._model_dir)
            reading = self._updates.receive(source, UpdateOptions(version=DEFAULT_VERSION), send)
        if "kv_cache" in tags and not self._has_cache:
            self._has_cache = True
            self._pausing.start()
        if reading is None:
            return MemoryState(True, "resumed", self.released)
        resumed: Future[MemoryState] = Future()

        def finish(done: Future[WeightUpdate]) -> None:
            error = done.exception()
            if error is None:
                resumed.set_result(MemoryState(True, "resumed", self.released))
            else:
                resumed.set_exception(error)

        reading.add_done_callback(finish)
        return resumed
