"""Names of models that workers have served lately: a request to one of them finds no worker for the moment (503), and
not a model that does not exist (404). The controller remembers too, but not beyond its own restart."""

from __future__ import annotations

from collections.abc import Callable, Iterable

REMEMBERED_S = 3600.0
MAX_NAMES = 10_000


class KnownModels:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen_at: dict[str, float] = {}
        """In the order of the times."""

    def note(self, names: Iterable[str]) -> None:
        """These models are served now."""
        now = self._clock()
        for name in names:
            self._seen_at.pop(name, None)
            self._seen_at[name] = now
        while self._seen_at and (len(self._seen_at) > MAX_NAMES or not self._is_fresh(next(iter(self._seen_at)))):
            del self._seen_at[next(iter(self._seen_at))]

    def contains(self, name: str) -> bool:
        return name in self._seen_at and self._is_fresh(name)

    def _is_fresh(self, name: str) -> bool:
        return self._clock() - self._seen_at[name] < REMEMBERED_S
