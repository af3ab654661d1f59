"""The models that are served, by name: their workers, and those that were served lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fastserve.dispatch import DispatchIndex
from fastserve.errors import OverloadedError


@dataclass(slots=True, eq=False)
class Model:
    index: DispatchIndex
    """The workers that can take a request."""
    workers: dict[str, bool] = field(default_factory=dict)
    """Every worker that serves it or will, by address, and whether it is usable: ready, and reached."""
    num_usable: int = 0
    out: dict[str, None] = field(default_factory=dict)
    """Usable workers that their breakers keep out, the longest first."""


class ModelBook:
    """Models by name; at most `max_models`, and as many that were served up to `memory_s` ago.

    Pure: the time, in seconds of any monotonic clock, is an argument.
    """

    def __init__(self, make_index: Callable[[], DispatchIndex], max_models: int, memory_s: float) -> None:
        self._make_index = make_index
        self._max_models = max_models
        self._memory_s = memory_s
        self._models: dict[str, Model] = {}
        self._left: OrderedDict[str, float] = OrderedDict()
        """When the last worker of a model left, oldest first."""

    def get(self, name: str) -> Model | None:
        return self._models.get(name)

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def check_room(self, names: Iterable[str]) -> None:
        """Raises OverloadedError when there is no room for those of the names that are new."""
        if len(self._models) + sum(name not in self._models for name in names) > self._max_models:
            raise OverloadedError(
                f"The controller knows {self._max_models:,} names of models and takes no more (--max-model-names).",
                retry_after_s=10.0,
            )

    def add(self, name: str, address: str) -> None:
        """A worker serves the model, and is not usable yet."""
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = Model(self._make_index())
            self._left.pop(name, None)
        model.workers[address] = False

    def discard(self, name: str, address: str, now: float) -> None:
        """A worker, no longer usable, serves the model no more."""
        model = self._models[name]
        del model.workers[address]
        if not model.workers:
            del self._models[name]
            self._left[name] = now
            if len(self._left) > self._max_models:
                self._left.popitem(last=False)

    def was_served(self, name: str, now: float) -> bool:
        """Whether the model was served lately."""
        while self._left and now - next(iter(self._left.values())) >= self._memory_s:
            self._left.popitem(last=False)
        return name in self._left
