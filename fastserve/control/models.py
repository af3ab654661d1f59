"""Models by name and capability: the workers that serve them, and the models that were served until lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fastserve.dispatch import DispatchIndex
from fastserve.errors import OverloadedError

KeyT = TypeVar("KeyT")


@dataclass(slots=True, eq=False)
class Pool:
    """The workers that offer one capability for one model."""

    index: DispatchIndex
    """Workers that can take a request, without the paused ones."""
    paused_index: DispatchIndex
    """Paused workers that can take a request: chosen only when `index` has no worker for it."""
    workers: dict[str, bool] = field(default_factory=dict)
    """All workers of the pool by address; True if usable (ready and reachable)."""
    num_usable: int = 0
    ejected: dict[str, None] = field(default_factory=dict)
    """Usable workers that get no requests because their breakers are open, oldest first."""

    def set(self, address: str, speed: float, in_flight: int, *, is_paused: bool) -> None:
        """Add a worker that can take a request, or update it; see `DispatchIndex.set`."""
        index, other = (self.paused_index, self.index) if is_paused else (self.index, self.paused_index)
        other.remove(address)
        index.set(address, speed, in_flight)

    def remove(self, address: str) -> None:
        """Remove a worker that cannot take a request. An unknown one is no error."""
        self.index.remove(address)
        self.paused_index.remove(address)


class ServedModels:
    """Models by name, at most `max_models`, with a pool of workers for each capability. Remembers as many models that
    were served up to `memory_s` ago.

    No I/O and no clock: callers pass the time, in monotonic seconds.
    """

    def __init__(self, make_index: Callable[[], DispatchIndex], max_models: int, memory_s: float) -> None:
        self._make_index = make_index
        self._max_models = max_models
        self._models: dict[str, dict[str, Pool]] = {}
        self._former_models: _RecentKeys[str] = _RecentKeys(max_models, memory_s)
        self._former_pools: _RecentKeys[tuple[str, str]] = _RecentKeys(max_models, memory_s)

    def pools(self, name: str) -> Mapping[str, Pool]:
        """The model's pools by capability; empty for a model that nobody serves."""
        return self._models.get(name, {})

    def check_room(self, names: Iterable[str]) -> None:
        """Raises OverloadedError if the names that are new exceed `max_models`."""
        if len(self._models) + sum(name not in self._models for name in names) > self._max_models:
            raise OverloadedError(
                f"The controller knows {self._max_models:,} names of models and takes no more (--max-model-names).",
                retry_after_s=10.0,
            )

    def add(self, name: str, capability: str, address: str) -> Pool:
        """Add a worker, not usable yet, to the pool of the model and capability. Returns the pool."""
        pools = self._models.setdefault(name, {})
        pool = pools.get(capability)
        if pool is None:
            pool = pools[capability] = Pool(self._make_index(), self._make_index())
            self._former_models.discard(name)
            self._former_pools.discard((name, capability))
        pool.workers[address] = False
        return pool

    def discard(self, name: str, capability: str, address: str, now: float, *, is_withdrawn: bool = False) -> None:
        """Remove a worker, no longer usable, from a pool. With `is_withdrawn` it still serves the model and has stated
        that it does not offer the capability, so clients need not wait for the capability to come back.
        """
        pools = self._models[name]
        del pools[capability].workers[address]
        if not pools[capability].workers:
            del pools[capability]
            if not is_withdrawn:
                self._former_pools.note((name, capability), now)
        if not pools:
            del self._models[name]
            self._former_models.note(name, now)

    def was_served(self, name: str, now: float, capability: str | None = None) -> bool:
        """Whether the model was served lately (with `capability`, if given) and is not served now."""
        if capability is None:
            return self._former_models.holds(name, now)
        return self._former_pools.holds((name, capability), now)


class _RecentKeys(Generic[KeyT]):
    """Keys noted up to `memory_s` ago, at most the newest `max_keys`."""

    def __init__(self, max_keys: int, memory_s: float) -> None:
        self._max_keys = max_keys
        self._memory_s = memory_s
        self._noted_at: OrderedDict[KeyT, float] = OrderedDict()
        """Time of the last note of each key, oldest first."""

    def note(self, key: KeyT, now: float) -> None:
        self._noted_at[key] = now
        self._noted_at.move_to_end(key)
        if len(self._noted_at) > self._max_keys:
            self._noted_at.popitem(last=False)

    def discard(self, key: KeyT) -> None:
        self._noted_at.pop(key, None)

    def holds(self, key: KeyT, now: float) -> bool:
        while self._noted_at and now - next(iter(self._noted_at.values())) >= self._memory_s:
            self._noted_at.popitem(last=False)
        return key in self._noted_at
