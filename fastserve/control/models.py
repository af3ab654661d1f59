"""The models that are served, by name and capability: their workers, and those that were served lately."""

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
    """The workers that offer one capability of one model."""

    index: DispatchIndex
    """Workers that can take a request, without the paused ones."""
    paused_index: DispatchIndex
    """Paused workers that can take a request: chosen only when `index` has no worker for it."""
    workers: dict[str, bool] = field(default_factory=dict)
    """Every worker that offers it or will, by address, and whether it is usable: ready, and reached."""
    num_usable: int = 0
    out: dict[str, None] = field(default_factory=dict)
    """Usable workers that their breakers keep out, the longest first."""

    def set(self, address: str, speed: float, in_flight: int, *, is_paused: bool) -> None:
        """Add a worker that can take a request, or update it; see `DispatchIndex.set`."""
        index, other = (self.paused_index, self.index) if is_paused else (self.index, self.paused_index)
        other.remove(address)
        index.set(address, speed, in_flight)

    def remove(self, address: str) -> None:
        """The worker can take no request now; an unknown one is no error."""
        self.index.remove(address)
        self.paused_index.remove(address)


class ModelBook:
    """Models by name, with a pool of workers for each capability; at most `max_models`, and as many that were served up
    to `memory_s` ago.

    Pure: the time, in seconds of any monotonic clock, is an argument.
    """

    def __init__(self, make_index: Callable[[], DispatchIndex], max_models: int, memory_s: float) -> None:
        self._make_index = make_index
        self._max_models = max_models
        self._models: dict[str, dict[str, Pool]] = {}
        self._left_models: _Memory[str] = _Memory(max_models, memory_s)
        self._left_pools: _Memory[tuple[str, str]] = _Memory(max_models, memory_s)

    def pools(self, name: str) -> Mapping[str, Pool]:
        """The model's pools by capability; none for a model that nobody serves."""
        return self._models.get(name, {})

    def check_room(self, names: Iterable[str]) -> None:
        """Raises OverloadedError when there is no room for those of the names that are new."""
        if len(self._models) + sum(name not in self._models for name in names) > self._max_models:
            raise OverloadedError(
                f"The controller knows {self._max_models:,} names of models and takes no more (--max-model-names).",
                retry_after_s=10.0,
            )

    def add(self, name: str, capability: str, address: str) -> Pool:
        """A worker offers the capability of the model, and is not usable yet. Returns the pool that it is in now."""
        pools = self._models.setdefault(name, {})
        pool = pools.get(capability)
        if pool is None:
            pool = pools[capability] = Pool(self._make_index(), self._make_index())
            self._left_models.discard(name)
            self._left_pools.discard((name, capability))
        pool.workers[address] = False
        return pool

    def discard(self, name: str, capability: str, address: str, now: float, *, is_withdrawn: bool = False) -> None:
        """A worker, no longer usable, leaves a pool. With `is_withdrawn` it still serves the model, but says that it
        does not offer the capability: there is no reason to wait for the capability to come back.
        """
        pools = self._models[name]
        del pools[capability].workers[address]
        if not pools[capability].workers:
            del pools[capability]
            if not is_withdrawn:
                self._left_pools.note((name, capability), now)
        if not pools:
            del self._models[name]
            self._left_models.note(name, now)

    def was_served(self, name: str, now: float, capability: str | None = None) -> bool:
        """Whether the model was served lately; with `capability`, whether it was served with that."""
        if capability is None:
            return self._left_models.holds(name, now)
        return self._left_pools.holds((name, capability), now)


class _Memory(Generic[KeyT]):
    """Keys that were noted up to `memory_s` ago, the newest `max_keys` of them."""

    def __init__(self, max_keys: int, memory_s: float) -> None:
        self._max_keys = max_keys
        self._memory_s = memory_s
        self._noted_at: OrderedDict[KeyT, float] = OrderedDict()
        """Oldest first."""

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
