"""Adapters by name: the workers that serve them, and those that have them in memory.

Workers of a model with the same adapters share one list. A heartbeat carries only the digest of a worker's list; the
list itself is asked for when its digest is not known. No cost of a heartbeat or of a request depends on the number of
workers or of adapters, but that of a list which is new.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fastserve.protocol import MAX_LISTED_ADAPTERS, AdapterEntry, AdapterTable, ServedAdapter

KNOWN_LISTS = 10_000
"""Maximum number of different lists."""


class SampledSet:
    """A set of texts of which a few random ones are taken in constant time."""

    def __init__(self) -> None:
        self._members: list[str] = []
        self._position: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, member: str) -> bool:
        return member in self._position

    def add(self, member: str) -> None:
        if member not in self._position:
            self._position[member] = len(self._members)
            self._members.append(member)

    def remove(self, member: str) -> None:
        """Raises KeyError if it is not in the set."""
        position, last = self._position.pop(member), self._members.pop()
        if last != member:
            self._members[position] = last
            self._position[last] = position

    def sample(self, size: int, rng: random.Random) -> list[str]:
        """Different members, `size` at most; all members if they are up to twice as many."""
        if len(self._members) <= 2 * size:
            return self._members.copy()
        return list({self._members[int(rng.random() * len(self._members))]: None for _ in range(size)})


@dataclass(slots=True, eq=False)
class _List:
    models: tuple[str, ...]
    """Names of the base model."""
    names: dict[str, AdapterEntry]
    num_workers: int = 0


@dataclass(slots=True, eq=False)
class AdapterPlaces:
    """The lists that have an adapter of one name."""

    name: str
    lists: SampledSet = field(default_factory=SampledSet)
    """Keys."""
    models: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Names of each base model."""

    @property
    def bases(self) -> list[str]:
        """A name of each base model, sorted. Workers that share a name of their model have the same base."""
        merged: list[tuple[str, ...]] = []
        for names in self.models:
            linked = [other for other in merged if not set(names).isdisjoint(other)]
            merged = [other for other in merged if other not in linked] + [sum(linked, ()) + names]
        return sorted(names[0] for names in merged if names)


class AdapterDirectory:
    def __init__(self) -> None:
        self._lists: dict[str, _List] = {}
        """By key: digest and names of the base model."""
        self._key_of: dict[str, str] = {}
        """Key of each worker's list, also if that is not known, by address."""
        self._listed: set[str] = set()
        """Workers whose list is known."""
        self._places: dict[str, AdapterPlaces] = {}
        """By each text that may be a request's `model`: NAME, and BASE:NAME."""
        self._holders: dict[str, SampledSet] = {}
        """Addresses of the workers that have an adapter in memory, by its name."""
        self._held: dict[str, Sequence[str]] = {}
        """Names of the adapters in the memory of each worker, by its address."""
        self.version = 0

    # ---- heartbeats ---------------------------------------------------------------------------------------------

    def set(self, address: str, models: Sequence[str], digest: str, entries: Sequence[AdapterEntry] | None) -> None:
        """Note a heartbeat. `entries`: the list of the digest, if it came with it."""
        key = "\n".join((digest, *models)) if digest and models else ""
        if self._key_of.get(address, "") != key:
            self._leave(address)
            if key:
                self._key_of[address] = key
        if not key or address in self._listed:
            return
        known = self._lists.get(key)
        if known is None and entries is not None and len(self._lists) < KNOWN_LISTS:
            known = self._lists[key] = _List(tuple(models), {entry.name: entry for entry in entries})
            for text, name in _requested_as(known):
                places = self._places.setdefault(text, AdapterPlaces(name))
                places.lists.add(key)
                places.models[known.models] += 1
        if known is not None:
            known.num_workers += 1
            self._listed.add(address)
            self.version += 1

    def set_held(self, address: str, names: Sequence[str]) -> None:
        """Note which adapters the worker has in memory."""
        before = self._held.get(address, ())
        if names == before:
            return
        for name in before:
            holders = self._holders[name]
            holders.remove(address)
            if not holders:
                del self._holders[name]
        distinct = list(dict.fromkeys(names))
        for name in distinct:
            self._holders.setdefault(name, SampledSet()).add(address)
        self._held[address] = distinct

    def remove(self, address: str) -> None:
        """Remove a worker. An unknown one is no error."""
        self._leave(address)
        self.set_held(address, ())
        self._held.pop(address, None)

    def _leave(self, address: str) -> None:
        key = self._key_of.pop(address, "")
        if address not in self._listed:
            return
        self._listed.discard(address)
        self.version += 1
        known = self._lists[key]
        known.num_workers -= 1
        if known.num_workers:
            return
        del self._lists[key]
        for text, _ in _requested_as(known):
            places = self._places[text]
            places.lists.remove(key)
            places.models[known.models] -= 1
            places.models += Counter()  # drops those that are 0
            if not places.lists:
                del self._places[text]

    # ---- queries ------------------------------------------------------------------------------------------------

    def is_missing(self, address: str) -> bool:
        """Whether the worker should send its list."""
        return address in self._key_of and self._key_of[address] not in self._lists

    def list_of(self, address: str) -> str:
        """Key of the worker's list; "" if it has none, or that is not known."""
        return self._key_of[address] if address in self._listed else ""

    def find(self, model: str) -> AdapterPlaces | None:
        """The adapter of a request's `model`, `NAME` or `BASE:NAME`; None for an unknown one, and for the NAME of
        adapters of several models.
        """
        places = self._places.get(model)
        is_unique = places is not None and (places.name != model or len(places.models) == 1 or len(places.bases) == 1)
        return places if is_unique else None

    def has_name(self, name: str) -> bool:
        """Whether any model has an adapter of this name."""
        return name in self._places

    def base_of(self, places: AdapterPlaces) -> str:
        """A name of the adapter's base model."""
        return next(iter(places.models))[0]

    def holders(self, name: str, size: int, rng: random.Random) -> list[str]:
        """Workers that have the adapter in memory (see `SampledSet.sample`)."""
        return self._holders[name].sample(size, rng) if name in self._holders else []

    def table(self, known_version: int) -> AdapterTable:
        """Each adapter once for each base model."""
        if known_version == self.version:
            return AdapterTable(version=self.version)
        roots: dict[tuple[str, str], str] = {}
        for known in self._lists.values():
            for entry in known.names.values():
                for parent in known.models:
                    roots[entry.name, parent] = entry.root
        names = sorted(text for text, places in self._places.items() if text == places.name)
        rows = (
            ServedAdapter(name=name, root=roots[name, parent], parent=parent)
            for name in names
            for parent in self._places[name].bases
        )
        return AdapterTable(version=self.version, adapters=list(itertools.islice(rows, MAX_LISTED_ADAPTERS)))


def _requested_as(known: _List) -> Iterable[tuple[str, str]]:
    """Values of a request's `model` that mean an adapter, each with the adapter's name."""
    for name in known.names:
        yield name, name
        for base in known.models:
            yield f"{base}:{name}", name
