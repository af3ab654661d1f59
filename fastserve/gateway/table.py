"""The last routing table, kept for the times when the controller is away or has just been restarted. No I/O here."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fastserve.protocol import RoutingTable, WorkerEntry

MISSING_GRACE_S = 10.0
"""How long a worker stays usable here after the controller's table no longer shows it: a restarted controller knows
no worker before the next heartbeat."""
SUSPECT_S = 3.0
"""How long a worker that has just failed comes after all others."""
SLOWEST = 1e-6
"""Stands for a speed of zero, which would divide badly."""


@dataclass
class _Row:
    entry: WorkerEntry
    others: int
    """Requests that came by other ways than through this process, when the table was made."""
    missing_since: float | None = None


class CachedTable:
    def __init__(self, clock: Callable[[], float], rng: random.Random) -> None:
        self._clock = clock
        self._rng = rng
        self._rows: dict[str, _Row] = {}
        self._suspects: dict[str, float] = {}

    def update(self, table: RoutingTable, in_flight: Mapping[str, int]) -> None:
        """Take over the controller's table. `in_flight` is this process's own share of each worker's requests."""
        now = self._clock()
        present: dict[str, _Row] = {}
        for entry in table.workers:
            others = max(0, entry.in_flight - in_flight.get(entry.address, 0))
            present[entry.address] = _Row(entry, others)
        for address, row in self._rows.items():
            if address not in present:
                missing_since = now if row.missing_since is None else row.missing_since
                if now - missing_since < MISSING_GRACE_S:
                    present[address] = _Row(row.entry, row.others, missing_since)
        self._rows = present
        self._suspects = {address: until for address, until in self._suspects.items() if until > now}

    def suspect(self, address: str) -> None:
        """A connection to this worker failed: prefer others for a while."""
        self._suspects[address] = self._clock() + SUSPECT_S

    def choose(self, model: str, exclude: Collection[str], in_flight: Mapping[str, int]) -> str:
        """The worker with the least work for its speed, ties broken at random; "" when none is left."""
        now = self._clock()

        def cost(address: str, row: _Row) -> tuple[bool, bool, float, float]:
            load = (row.others + in_flight.get(address, 0)) / max(row.entry.speed, SLOWEST)
            suspect = self._suspects.get(address, now) > now
            return suspect, row.missing_since is not None, load, self._rng.random()

        candidates = [
            (cost(address, row), address)
            for address, row in self._rows.items()
            if model in row.entry.status.model_names and address not in exclude
        ]
        return min(candidates)[1] if candidates else ""

    def is_listed(self, address: str) -> bool:
        """Whether the controller's last table shows the worker."""
        row = self._rows.get(address)
        return row is not None and row.missing_since is None

    def model_names(self) -> list[str]:
        """Sorted, each once. Rows missing from the last table count only when it was empty (a restarted controller)."""
        present = [row for row in self._rows.values() if row.missing_since is None]
        rows = present or list(self._rows.values())
        return sorted({name for row in rows for name in row.entry.status.model_names})

    def is_serving(self, address: str, lease: str) -> bool:
        """Whether the worker said in its last heartbeat that it is at work on this lease."""
        row = self._rows.get(address)
        return row is not None and row.missing_since is None and lease in row.entry.status.leases
