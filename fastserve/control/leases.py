"""Leases: which request runs on which worker.

The API server acquires and releases a lease, and the worker lists it in its heartbeats while it serves the request. Any
of them may die, and a restarted controller knows no leases. So:

- an unknown lease that a worker lists is adopted;
- a lease that the worker has listed ends when a heartbeat no longer lists it;
- a lease that the worker has not listed yet may still be on its way, and ends after a grace time;
- a released lease may still be in a heartbeat that was sent before: for RELEASE_MEMORY_S it is not adopted again. A
  lease that is listed after that really runs there.

No I/O and no clock: callers pass the time, in monotonic seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

RELEASE_MEMORY_S = 5.0
MAX_REMEMBERED = 200_000
"""Released leases that are remembered, newest first: with the cluster key anybody can release leases that never
existed."""


@dataclass(slots=True)
class _LeaseSet:
    """One worker's leases."""

    since: dict[str, float] = field(default_factory=dict)
    """Time at which each lease was granted or adopted."""
    unlisted: set[str] = field(default_factory=set)
    """Leases that the worker has not listed yet."""


class WorkerLeases:
    """The leases of all workers, at most `max_leases`. Each lease is on one worker at most."""

    def __init__(self, max_leases: int) -> None:
        self._max_leases = max_leases
        self._by_worker: dict[str, _LeaseSet] = {}
        self._owner: dict[str, str] = {}
        self._released: OrderedDict[str, float] = OrderedDict()
        """Time at which each lease was released, oldest first."""

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
        held = self._by_worker.get(worker, _LeaseSet())
        return [lease for lease in held.since if lease not in held.unlisted]

    def owner(self, lease: str) -> str | None:
        return self._owner.get(lease)

    def granted_at(self, lease: str) -> float:
        """Time at which a known lease was granted or adopted."""
        return self._by_worker[self._owner[lease]].since[lease]

    def is_served(self, lease: str) -> bool:
        """Whether the lease's worker listed it in its last heartbeat."""
        worker = self._owner.get(lease)
        return worker is not None and lease not in self._by_worker[worker].unlisted

    def grant(self, lease: str, worker: str, now: float) -> None:
        """Assign `lease` to `worker`, whichever worker had it before."""
        self._drop(lease)
        self._released.pop(lease, None)
        self._put(lease, worker, now)
        self._by_worker[worker].unlisted.add(lease)

    def release(self, leases: Iterable[str], now: float) -> None:
        """End leases. Unknown ones are remembered as released too."""
        self._forget_released(now)
        for lease in leases:
            self._drop(lease)
            self._released[lease] = now
            self._released.move_to_end(lease)
        while len(self._released) > MAX_REMEMBERED:
            self._released.popitem(last=False)

    def drop_worker(self, worker: str) -> None:
        for lease in self._by_worker.pop(worker, _LeaseSet()).since:
            del self._owner[lease]

    def reconcile(self, worker: str, listed: Collection[str], now: float, grace_s: float) -> int:
        """Apply the list of leases that a worker reports. Returns how many exceed `max_leases` and were left out."""
        self._forget_released(now)
        held = self._by_worker.get(worker)
        if held is None:
            if not listed:
                return 0
            held = self._by_worker[worker] = _LeaseSet()
        names = dict.fromkeys(listed)
        # Most lists are equal to the last one or nearly so: comparing views is faster than checking each lease.
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
        """Apply the number of requests of a worker that does not list leases: it cannot have more leases than that, and
        the oldest are assumed to have ended.
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
            held = self._by_worker[worker] = _LeaseSet()
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
