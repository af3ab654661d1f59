"""Which request runs on which worker: the controller's book of leases.

Three parties tell about a lease, and any of them may die: the API server takes and releases it, the worker lists it in
its heartbeats while it serves the request, and the controller may be restarted and know nothing. So:

- a listed lease that nobody here knows is adopted;
- a lease that the worker has listed ends when it lists it no more;
- a lease that the worker has not listed yet may still be on its way, and ends after a grace time;
- a released lease may still stand in a heartbeat that was written before: for RELEASE_MEMORY_S it is not taken up
  again. What a worker lists after that really runs there.

Pure: the time, in seconds of any monotonic clock, is an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

RELEASE_MEMORY_S = 5.0
MAX_REMEMBERED = 200_000
"""Released leases that are remembered, the newest ones: whoever has the cluster key can release what never was."""


@dataclass(slots=True)
class _Held:
    """One worker's leases."""

    since: dict[str, float] = field(default_factory=dict)
    """When each was granted, or adopted from the worker's list."""
    unlisted: set[str] = field(default_factory=set)
    """Those that the worker has not listed yet."""


class LeaseBook:
    """Each lease is on one worker at most, and all workers together have at most `max_leases`."""

    def __init__(self, max_leases: int) -> None:
        self._max_leases = max_leases
        self._by_worker: dict[str, _Held] = {}
        self._owner: dict[str, str] = {}
        self._released: OrderedDict[str, float] = OrderedDict()
        """When each lease was released, oldest first."""

    def __len__(self) -> int:
        return len(self._owner)

    @property
    def is_full(self) -> bool:
        return len(self._owner) >= self._max_leases

    def count(self, worker: str) -> int:
        held = self._by_worker.get(worker)
        return 0 if held is None else len(held.since)

    def served(self, worker: str) -> list[str]:
        """The leases that the worker listed in its last heartbeat."""
        held = self._by_worker.get(worker, _Held())
        return [lease for lease in held.since if lease not in held.unlisted]

    def owner(self, lease: str) -> str | None:
        return self._owner.get(lease)

    def granted_at(self, lease: str) -> float:
        """When a known lease was granted, or adopted from a worker's list."""
        return self._by_worker[self._owner[lease]].since[lease]

    def is_served(self, lease: str) -> bool:
        """Whether the lease's worker has listed it, in its last heartbeat too."""
        worker = self._owner.get(lease)
        return worker is not None and lease not in self._by_worker[worker].unlisted

    def grant(self, lease: str, worker: str, now: float) -> None:
        """Put `lease` on `worker`, and take it from the worker that had it."""
        self._drop(lease)
        self._released.pop(lease, None)
        self._put(lease, worker, now)
        self._by_worker[worker].unlisted.add(lease)

    def release(self, leases: Iterable[str], now: float) -> None:
        """End leases; those that are not known here are remembered too."""
        self._forget_released(now)
        for lease in leases:
            self._drop(lease)
            self._released[lease] = now
            self._released.move_to_end(lease)
        while len(self._released) > MAX_REMEMBERED:
            self._released.popitem(last=False)

    def drop_worker(self, worker: str) -> None:
        for lease in self._by_worker.pop(worker, _Held()).since:
            del self._owner[lease]

    def reconcile(self, worker: str, listed: Collection[str], now: float, grace_s: float) -> int:
        """Take in the leases that a worker says it serves. Returns how many there was no room for."""
        self._forget_released(now)
        held = self._by_worker.get(worker)
        if held is None:
            if not listed:
                return 0
            held = self._by_worker[worker] = _Held()
        names = dict.fromkeys(listed)
        # Most lists are like the last one, or nearly: views compare them faster than a look at each lease.
        if held.since.keys() == names.keys() and not held.unlisted:
            return 0
        held.unlisted.difference_update(names)
        for lease in held.since.keys() - names.keys():
            if lease not in held.unlisted or now - held.since[lease] >= grace_s:
                self._drop(lease)
        left_out = 0
        fresh = names.keys() - held.since.keys()
        for lease in names if fresh else ():  # in the order of the list
            if lease in fresh and lease not in self._owner and lease not in self._released:
                if self.is_full:
                    left_out += 1
                else:
                    self._put(lease, worker, now)
        return left_out

    def reconcile_count(self, worker: str, num_requests: int, now: float, grace_s: float) -> None:
        """The same for a worker that tells only how many requests it has: it cannot have more leases than that, and the
        oldest are taken to be the ended ones.
        """
        held = self._by_worker.get(worker)
        if held is None:
            return
        old = [lease for lease, since in held.since.items() if now - since >= grace_s]
        surplus = max(0, len(held.since) - num_requests)
        for lease in old[:surplus]:
            self._drop(lease)

    def _put(self, lease: str, worker: str, now: float) -> None:
        held = self._by_worker.get(worker)
        if held is None:
            held = self._by_worker[worker] = _Held()
        held.since[lease] = now
        self._owner[lease] = worker

    def _drop(self, lease: str) -> None:
        worker = self._owner.pop(lease, None)
        if worker is not None:
            held = self._by_worker[worker]
            del held.since[lease]
            held.unlisted.discard(lease)

    def _forget_released(self, now: float) -> None:
        while self._released and now - next(iter(self._released.values())) >= RELEASE_MEMORY_S:
            self._released.popitem(last=False)
