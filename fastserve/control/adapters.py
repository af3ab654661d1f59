"""Adapters by name: the workers that serve them. Workers with the same adapters share one list.

A heartbeat carries only the digest of a worker's list. The list itself is asked for when its digest is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastserve.protocol import MAX_LISTED_ADAPTERS, AdapterEntry, AdapterTable, ServedAdapter

KNOWN_LISTS = 10_000
"""Maximum number of different lists."""


@dataclass(slots=True, eq=False)
class _List:
    names: dict[str, AdapterEntry]
    workers: dict[str, None] = field(default_factory=dict)
    """Addresses, in order."""


class AdapterDirectory:
    def __init__(self) -> None:
        self._lists: dict[str, _List] = {}
        self._digests: dict[str, str] = {}
        """By address."""
        self._models: dict[str, tuple[str, ...]] = {}
        """Names of the base model, by address."""
        self._by_name: dict[str, dict[str, None]] = {}
        """Digests of the lists with a name."""
        self.version = 0

    def set(self, address: str, models: Sequence[str], digest: str, entries: Sequence[AdapterEntry] | None) -> None:
        """Note a heartbeat. `entries`: the list of the digest, if it came with it."""
        if self._digests.get(address, "") != digest or self._models.get(address, ()) != tuple(models):
            self.remove(address)
            if digest:
                self._digests[address], self._models[address] = digest, tuple(models)
        if not digest:
            return
        known = self._lists.get(digest)
        if known is None and entries is not None and len(self._lists) < KNOWN_LISTS:
            known = self._lists[digest] = _List({entry.name: entry for entry in entries})
            for name in known.names:
                self._by_name.setdefault(name, {})[digest] = None
        if known is not None and address not in known.workers:
            known.workers[address] = None
            self.version += 1

    def remove(self, address: str) -> None:
        digest = self._digests.pop(address, "")
        self._models.pop(address, None)
        known = self._lists.get(digest)
        if known is None:
            return
        if known.workers.pop(address, self) is None:
            self.version += 1
        if not known.workers:
            del self._lists[digest]
            for name in known.names:
                del self._by_name[name][digest]
                if not self._by_name[name]:
                    del self._by_name[name]

    def is_missing(self, digest: str) -> bool:
        """Whether the worker should send the list of this digest."""
        return bool(digest) and digest not in self._lists

    def find(self, model: str) -> tuple[str, list[str]]:
        """The adapter of a request's `model`, `NAME` or `BASE:NAME`, and the addresses that serve it; "" for none."""
        if model in self._by_name:
            return model, self._workers(model)
        base, colon, name = model.rpartition(":")
        if not colon or name not in self._by_name:
            return "", []
        addresses = [address for address in self._workers(name) if base in self._models[address]]
        return (name, addresses) if addresses else ("", [])

    def table(self, known_version: int) -> AdapterTable:
        """Each adapter once for each base model."""
        if known_version == self.version:
            return AdapterTable(version=self.version)
        rows: dict[tuple[str, str], ServedAdapter] = {}
        for known in self._lists.values():
            for parent in dict.fromkeys(self._models[address][0] for address in known.workers if self._models[address]):
                for entry in known.names.values():
                    rows[entry.name, parent] = ServedAdapter(name=entry.name, root=entry.root, parent=parent)
        return AdapterTable(version=self.version, adapters=[rows[key] for key in sorted(rows)[:MAX_LISTED_ADAPTERS]])

    def _workers(self, name: str) -> list[str]:
        return [address for digest in self._by_name[name] for address in self._lists[digest].workers]
