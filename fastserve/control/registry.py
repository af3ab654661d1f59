"""The controller's memory: the workers, what each one last said, and how many requests it has.

Soft state: everything here comes back with the workers' next heartbeats. No I/O and no waiting; time and chance are
handed in. Silent workers are dropped when the registry is next asked anything, so there is no task that could die.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fastserve.control import dispatch
from fastserve.control.dispatch import Candidate
from fastserve.control.leases import LeaseBook
from fastserve.control.speed import relative_speeds
from fastserve.protocol import AcquireResponse, RoutingTable, WorkerEntry, WorkerStatus

logger = logging.getLogger(__name__)

MISSED_HEARTBEATS = 3
MIN_EXPIRATION_S = 2.5
"""A floor under short heartbeat intervals: a busy machine may well delay a heartbeat by this much."""
LEASE_GRACE_HEARTBEATS = 2
MIN_LEASE_GRACE_S = 2.0
RETRY_S = 5.0
"""After a failure, a worker that sends no heartbeats cannot tell that it is back: it is tried again after this time."""


@dataclass(slots=True)
class _Worker:
    address: str
    status: WorkerStatus
    check_heart_beat: bool
    last_beat: float
    unleased: int = 0
    """Requests that it has besides the leases, as of the last heartbeat."""
    dispatched: int = 0
    """Sent to it without a lease since the last heartbeat."""
    failed_at: float | None = None
    """When a connection to it failed; None after a sign of life."""


class WorkerRegistry:
    """The workers by address. One thread only; each method is one step that nothing can interrupt."""

    def __init__(
        self,
        *,
        dispatch_method: str,
        heartbeat_expiration_s: float,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """`clock` gives monotonic seconds. Raises StartupError when there is no such dispatch method."""
        self._dispatch_method = dispatch_method
        self._choose = dispatch.load(dispatch_method)
        self._heartbeat_expiration_s = heartbeat_expiration_s
        self._clock = clock
        self._rng = rng
        self._workers: dict[str, _Worker] = {}
        self._leases = LeaseBook()
        self._speeds: dict[str, float] = {}

    # ---- what workers tell --------------------------------------------------------------------------------------

    def register(self, name: str, check_heart_beat: bool, status: WorkerStatus) -> None:
        """A worker is there, perhaps again. Without `check_heart_beat` it is never dropped for silence."""
        self.expire()
        worker = self._workers.get(name)
        if worker is None:
            worker = self._add(name, check_heart_beat, status)
        worker.check_heart_beat = check_heart_beat
        self._sign_of_life(worker, status.queue_length, status)

    def heartbeat(self, name: str, queue_length: int, status: WorkerStatus | None = None) -> bool:
        """A sign of life. A whole `status` registers an unknown worker; without it, False asks it to register."""
        self.expire()
        worker = self._workers.get(name)
        if worker is None:
            if status is None:
                return False
            worker = self._add(name, True, status)
        self._sign_of_life(worker, queue_length, status)
        return True

    def polled(self, name: str, status: WorkerStatus) -> None:
        """A worker was asked for its status and answered.

        A fastserve worker may answer in FastChat's short form. Its heartbeats tell more, so its status stays then.
        """
        self.expire()
        worker = self._workers.get(name)
        if worker is not None:
            short = worker.status.heartbeat_interval_s is not None and status.heartbeat_interval_s is None
            self._sign_of_life(worker, status.queue_length, None if short else status)

    def deregister(self, name: str) -> None:
        """A worker says goodbye; an unknown one is no error."""
        self.expire()
        if name in self._workers:
            self._remove(name, "it said goodbye")

    def report_failure(self, name: str) -> None:
        """A connection to the worker failed: it gets no more requests until it gives a sign of life."""
        self.expire()
        worker = self._workers.get(name)
        if worker is not None:
            if worker.failed_at is None:
                logger.warning("Worker %s is out of dispatch: a connection to it failed. %s", name, _models(worker))
            worker.failed_at = self._clock()

    # ---- what API servers ask -----------------------------------------------------------------------------------

    def acquire(self, model: str, lease: str, exclude: Collection[str] = ()) -> AcquireResponse:
        """Choose a worker for a request and count the request on it until `release`.

        A request that tries again may use its lease again: it then counts on the new worker only.
        """
        if self._leases.owner(lease) is not None:
            self._leases.release([lease], self._clock())
        address = self._pick(model, exclude)
        if address:
            self._leases.grant(lease, address, self._clock())
            return AcquireResponse(address=address, known=True)
        return AcquireResponse(address="", known=any(model in w.status.model_names for w in self._workers.values()))

    def release(self, leases: Collection[str]) -> None:
        """Requests have ended; unknown leases are no error."""
        self._leases.release(leases, self._clock())

    def get_worker_address(self, model: str) -> str:
        """The address for a request without a lease (FastChat's way), or ""; counted until the next heartbeat."""
        address = self._pick(model, ())
        if address:
            self._workers[address].dispatched += 1
        return address

    def candidates(self, model: str) -> list[Candidate]:
        """The workers that can take a request for the model."""
        self.expire()
        return [self._candidate(w) for w in self._workers.values() if model in w.status.model_names and self._usable(w)]

    def list_models(self, *, multimodal: bool | None = None) -> list[str]:
        """Names of the models served, sorted; with `multimodal`, by workers with or without that mark only.

        A worker whose connection failed still counts: it is either back or dropped within a few heartbeats.
        """
        self.expire()
        statuses = [w.status for w in self._workers.values()]
        return sorted({n for s in statuses if multimodal in (None, s.multimodal) for n in s.model_names})

    def table(self) -> RoutingTable:
        """Every worker that can take requests."""
        self.expire()
        usable = (w for w in self._workers.values() if self._usable(w))
        workers = [
            WorkerEntry(address=w.address, status=w.status, in_flight=self._in_flight(w), speed=self._speeds[w.address])
            for w in usable
        ]
        return RoutingTable(dispatch_method=self._dispatch_method, workers=workers)

    def addresses(self) -> list[str]:
        """Every worker, also those whose connection failed."""
        self.expire()
        return list(self._workers)

    def expire(self) -> None:
        """Drop the workers that have been silent for too long. Every question does this first."""
        now = self._clock()
        silent = [w for w in self._workers.values() if w.check_heart_beat and now - w.last_beat > self._patience_s(w)]
        for worker in silent:
            self._remove(worker.address, f"it was silent for {now - worker.last_beat:.1f} s")

    # ---- inside -------------------------------------------------------------------------------------------------

    def _add(self, name: str, check_heart_beat: bool, status: WorkerStatus) -> _Worker:
        worker = _Worker(name, status, check_heart_beat, self._clock())
        self._workers[name] = worker
        logger.info("Worker %s is registered. %s", name, _models(worker))
        return worker

    def _remove(self, name: str, reason: str) -> None:
        worker = self._workers.pop(name)
        self._leases.drop_worker(name)
        self._speeds = relative_speeds({w.address: w.status for w in self._workers.values()})
        logger.warning("Worker %s is dropped: %s. %s", name, reason, _models(worker))

    def _sign_of_life(self, worker: _Worker, queue_length: int, status: WorkerStatus | None) -> None:
        now = self._clock()
        if worker.failed_at is not None:
            logger.info("Worker %s is back. %s", worker.address, _models(worker))
        worker.status = status or worker.status.model_copy(update={"queue_length": queue_length})
        worker.last_beat = now
        worker.failed_at = None
        worker.dispatched = 0
        interval = worker.status.heartbeat_interval_s
        grace_s = max(LEASE_GRACE_HEARTBEATS * (interval or 0.0), MIN_LEASE_GRACE_S)
        if status is not None and interval is not None:
            self._leases.reconcile(worker.address, status.leases, now, grace_s)
            worker.unleased = status.unleased
        else:
            # No list of leases came with it; the queue length covers leased requests and others alike.
            self._leases.reconcile_count(worker.address, queue_length, now, grace_s)
            worker.unleased = max(0, queue_length - self._leases.count(worker.address))
        self._speeds = relative_speeds({w.address: w.status for w in self._workers.values()})

    def _pick(self, model: str, exclude: Collection[str]) -> str:
        candidates = [c for c in self.candidates(model) if c.address not in exclude]
        index = self._choose(candidates, self._rng) if candidates else None
        return "" if index is None else candidates[index].address

    def _candidate(self, worker: _Worker) -> Candidate:
        return Candidate(worker.address, self._speeds[worker.address], self._in_flight(worker))

    def _in_flight(self, worker: _Worker) -> int:
        return self._leases.count(worker.address) + worker.unleased + worker.dispatched

    def _usable(self, worker: _Worker) -> bool:
        if worker.failed_at is None:
            return True
        return not worker.check_heart_beat and self._clock() - worker.failed_at >= RETRY_S

    def _patience_s(self, worker: _Worker) -> float:
        interval = worker.status.heartbeat_interval_s
        return self._heartbeat_expiration_s if interval is None else max(MISSED_HEARTBEATS * interval, MIN_EXPIRATION_S)


def _models(worker: _Worker) -> str:
    return f"Models: {', '.join(worker.status.model_names) or 'none'}."
