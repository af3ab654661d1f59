"""Models that workers have served lately, and their capabilities.

A request to one of them that finds no worker gets a 503, not a 404 (no such model) or 400 (capability not supported).
The controller remembers them too, but not beyond its own restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

REMEMBERED_S = 3600.0
MAX_NAMES = 10_000


class KnownModels:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._models: dict[str, dict[str, float]] = {}
        """Time at which each capability was last seen, by model name; the model seen last is last."""

    def note(self, offered: Mapping[str, Collection[str]]) -> None:
        """Note models that are served now, with their capabilities."""
        now = self._clock()
        for name, capabilities in offered.items():
            seen_at = self._models.pop(name, {})
            seen_at.update(dict.fromkeys(capabilities, now))
            self._models[name] = seen_at
        while self._models and (len(self._models) > MAX_NAMES or not self.contains(next(iter(self._models)))):
            del self._models[next(iter(self._models))]

    def contains(self, name: str, capability: str | None = None) -> bool:
        """Whether the model was served lately; with `capability`, whether it was served with it."""
        seen_at = self._models.get(name, {})
        last = max(seen_at.values(), default=-math.inf) if capability is None else seen_at.get(capability, -math.inf)
        return self._clock() - last < REMEMBERED_S
