"""The adapters of the controller's last list, by the names that requests may use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from fastserve.protocol import ServedAdapter


class KnownAdapters:
    def __init__(self, adapters: Iterable[ServedAdapter]) -> None:
        self._by_name: dict[str, list[ServedAdapter]] = {}
        self._by_full_name: dict[str, ServedAdapter] = {}
        """By BASE:NAME."""
        self._by_root: dict[str, list[ServedAdapter]] = {}
        for one in adapters:
            self._by_name.setdefault(one.name, []).append(one)
            self._by_full_name[_full_name(one)] = one
            if one.root:
                self._by_root.setdefault(one.root, []).append(one)

    def find(self, model: str) -> ServedAdapter | None:
        """The adapter of a request's `model`, NAME or BASE:NAME; None for an unknown one, and for the NAME of adapters
        of several models.
        """
        same = self._by_name.get(model, ())
        return same[0] if len(same) == 1 else self._by_full_name.get(model)

    def from_source(self, source: str) -> list[ServedAdapter]:
        """The adapters that were loaded from this path or repository id, else those of this name."""
        return self._by_root.get(source, self._by_name.get(source, []))

    def choices(self, name: str) -> list[str]:
        """Names to ask for (`BASE:NAME`) where several models have adapters of this name; else empty."""
        same = self._by_name.get(name, ())
        return [_full_name(one) for one in same] if len(same) > 1 else []

    def ids(self, model_names: Collection[str]) -> Iterator[tuple[str, ServedAdapter]]:
        """Each adapter with its id: NAME, or BASE:NAME where another adapter or a model has the name too."""
        for one in self._by_full_name.values():
            yield self.id_of(one, model_names), one

    def id_of(self, adapter: ServedAdapter, model_names: Collection[str]) -> str:
        is_unique = len(self._by_name[adapter.name]) == 1 and adapter.name not in model_names
        return adapter.name if is_unique else _full_name(adapter)


def _full_name(adapter: ServedAdapter) -> str:
    return f"{adapter.parent}:{adapter.name}"
