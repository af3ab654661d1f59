"""Models that workers have served lately, and their capabilities: a request to one of them finds no worker for the
moment (503), and not a model that does not exist (404) or cannot do it (400). The controller remembers too, but not
beyond its own restart."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

REMEMBERED_S = 3600.0
MAX_NAMES = 10_000


class KnownModels:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._models: dict[str, dict[str, float]] = {}
        """By name, when each capability was last seen; the model seen last stands last."""

    def note(self, offered: Mapping[str, Collection[str]]) -> None:
        """These models are served now, with these capabilities."""
        now = self._clock()
        for name, capabilities in offered.items():
            seen_at = self._models.pop(name, {})
            seen_at.update(dict.fromkeys(capabilities, now))
            self._models[name] = seen_at
        while self._models and (len(self._models) > MAX_NAMES or not self.contains(next(iter(self._models)))):
            del self._models[next(iter(self._models))]

    def contains(self, name: str, capability: str | None = None) -> bool:
        """Whether the model was served lately; with `capability`, whether it was served with that."""
        seen_at = self._models.get(name, {})
        last = max(seen_at.values(), default=-math.inf) if capability is None else seen_at.get(capability, -math.inf)
        return self._clock() - last < REMEMBERED_S
