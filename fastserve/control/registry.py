"""The worker registry: the workers, the last status of each, and the number of its requests.

Soft state: after a restart everything comes back with the workers' next heartbeats. No I/O; the clock and the random
generator are passed in. What is due (dropping silent workers, probes of breakers) is done at the next call of any
method, so there is no background task that could die. The cost of a heartbeat does not depend on the number of workers,
that of a choice hardly.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from fastserve import dispatch
from fastserve.breaker import State as BreakerState
from fastserve.control.adapters import AdapterDirectory
from fastserve.control.changes import ChangeLog
from fastserve.control.choice import WorkerChoice
from fastserve.control.leases import WorkerLeases
from fastserve.control.metrics import Figures, WorkerFigures
from fastserve.control.models import Pool, ServedModels
from fastserve.control.speed import WorkerSpeeds
from fastserve.control.workers import WorkerRecord
from fastserve.errors import OverloadedError
from fastserve.observability.text import printable
from fastserve.protocol import (
    MAX_CAPABILITIES,
    MAX_REQUESTS,
    AcquireResponse,
    AdapterEntry,
    AdapterTable,
    RoutingTable,
    WorkerEntry,
    WorkerStatus,
)

logger = logging.getLogger(__name__)

MISSED_HEARTBEATS = 3
MIN_EXPIRATION_S = 2.5
"""Minimum, for workers with short heartbeat intervals: a busy machine may delay a heartbeat by this much."""
LEASE_GRACE_HEARTBEATS = 2
MIN_LEASE_GRACE_S = 2.0
RETRY_S = 5.0
"""After a failure, a worker that sends no heartbeats cannot report that it is back: it is tried again after this
time."""
REPORT_MEMORY_S = 30.0
"""A worker that has answered a request since it was reported is not taken out of dispatch by a further report within
this time."""
SPEED_CHANGE = 0.05
"""Relative change of a worker's speed from which on its row of the table counts as changed."""
BUSY_RETRY_AFTER_S = 1.0
MAX_LINES_PER_S = 50
LOADING_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    max_workers: int
    max_model_names: int
    """For all workers together."""
    max_leases: int
    """For all workers together."""
    model_memory_s: float


class WorkerRegistry:
    """The workers by address. For one thread; no method awaits, so each is atomic."""

    def __init__(
        self,
        *,
        dispatch_method: str,
        heartbeat_expiration_s: float,
        limits: RegistryLimits,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """`clock` gives monotonic seconds. Raises StartupError for an unknown dispatch method."""
        self._dispatch_method = dispatch_method
        self._heartbeat_expiration_s = heartbeat_expiration_s
        self._limits = limits
        self._clock = clock
        self._rng = rng
        self._workers: dict[str, WorkerRecord] = {}
        make_index = dispatch.load(dispatch_method)
        self._models = ServedModels(make_index, limits.max_model_names, limits.model_memory_s)
        self._adapters = AdapterDirectory()
        self._leases = WorkerLeases(limits.max_leases)
        self._speeds = WorkerSpeeds()
        self._choice = WorkerChoice(make_index, self._models, self._adapters, self._workers, self._load_of, rng)
        self._rows = ChangeLog()
        self._epoch = f"{rng.getrandbits(64):016x}"
        self._wakes: list[tuple[float, int, WorkerRecord]] = []
        self._sequence = itertools.count()
        self._log_second, self._num_lines = -math.inf, 0
        self._num_refused = 0
        self._num_breakers_opened = 0

    # ---- reports of workers -------------------------------------------------------------------------------------

    def register(self, name: str, check_heart_beat: bool, status: WorkerStatus) -> None:
        """Add a worker, or update a known one. Without `check_heart_beat` it is never dropped for silence.

        Raises OverloadedError at the limit of workers or model names; then nothing has changed.
        """
        self.expire()
        self._check_room(name, status)
        worker = self._workers.get(name) or self._add(name, check_heart_beat, status)
        worker.check_heart_beat = check_heart_beat
        self._sign_of_life(worker, status.queue_length, status)

    def heartbeat(
        self,
        name: str,
        queue_length: int,
        status: WorkerStatus | None = None,
        adapters: Sequence[AdapterEntry] | None = None,
    ) -> bool:
        """Note a sign of life. With a `status`, an unknown worker is registered; without, False asks it to register.

        Raises OverloadedError as `register` does.
        """
        self.expire()
        worker = self._workers.get(name)
        if status is not None:
            self._check_room(name, status)
            worker = worker or self._add(name, True, status)
        if worker is None:
            return False
        self._sign_of_life(worker, queue_length, status, adapters)
        return True

    def misses_adapters(self, name: str) -> bool:
        """Whether the worker should send the list of its adapters with the next heartbeat."""
        return self._adapters.is_missing(name)

    def polled(self, name: str, status: WorkerStatus) -> None:
        """Update a worker with the status that it gave when polled.

        A fastserve worker may answer with FastChat's fields alone. Its heartbeats report more, so then its status is
        kept.
        """
        self.expire()
        worker = self._workers.get(name)
        if worker is not None:
            self._check_room(name, status)
            short = worker.status.heartbeat_interval_s is not None and status.heartbeat_interval_s is None
            self._sign_of_life(worker, status.queue_length, None if short else status)

    def deregister(self, name: str) -> None:
        """Remove a worker that shuts down. An unknown one is no error."""
        self.expire()
        if name in self._workers:
            self._remove(name, "it said goodbye")

    # ---- reports of API servers ---------------------------------------------------------------------------------

    def report_failure(self, name: str) -> None:
        """A connection to the worker failed: it gets no more requests until it gives a sign of life.

        If it has answered a request since the last report, the fault lies between it and the reporting API server. Then
        the report only counts as a failure for its breaker.
        """
        self.expire()
        worker = self._workers.get(name)
        if worker is None:
            return
        now = self._clock()
        is_contradicted = worker.answered_at > worker.reported_at > now - REPORT_MEMORY_S
        worker.reported_at = now
        if not is_contradicted:
            if worker.failed_at is None:
                self._log(
                    logging.WARNING, "Worker %s is out of dispatch: a connection to it failed. %s", *_named(worker)
                )
            worker.failed_at = now
        self._failed_request(worker, now, None)
        self._update(worker, now)
        self._schedule(worker, now)

    def acquire(
        self, model: str, lease: str, exclude: Collection[str] = (), capability: str | None = None
    ) -> AcquireResponse:
        """Choose a worker that offers `capability` for a request, and count the request on it until `release`.

        A retry may use the same lease; the request then counts on the new worker only. Raises OverloadedError at the
        limit of leases.
        """
        self.expire()
        now = self._clock()
        if (before := self._leases.owner(lease)) is not None:
            self._leases.release([lease], now)
            self._update(self._workers[before], now)
        if self._leases.is_full:
            raise OverloadedError(f"{self._limits.max_leases:,} requests are running, and no more are taken.")
        worker = self._choice.choose(model, capability, exclude)
        if worker is None:
            self._num_refused += 1
            return self._refusal(self._choice.base_of(model), capability, now)
        self._leases.grant(lease, worker.address, now)
        if not worker.breaker.is_closed and worker.breaker.state(now) == "half-open":
            worker.breaker.start(now)
            worker.probe = lease
        self._update(worker, now)
        return AcquireResponse.model_construct(address=worker.address, known=True)

    def release(self, leases: Iterable[str], failed: Collection[str] = (), unused: Collection[str] = ()) -> None:
        """End the leases of requests that their workers failed (`failed`), that say nothing about their workers
        (`unused`), or that were answered (all others). Unknown leases are no error.
        """
        self.expire()
        now = self._clock()
        ended = dict.fromkeys(itertools.chain(leases, failed, unused))
        failed, unused = frozenset(failed), frozenset(unused)
        touched: dict[str, WorkerRecord] = {}
        for lease in ended:
            address = self._leases.owner(lease)
            if address is None:
                continue
            worker = touched[address] = self._workers[address]
            sent_at = self._leases.granted_at(lease)
            is_probe = worker.probe == lease
            if is_probe:
                worker.probe = None
            if lease in failed:
                # A lost connection was also reported by `report_failure`: it counts once.
                if worker.reported_at < sent_at:
                    self._failed_request(worker, now, sent_at)
            elif lease not in unused:
                worker.answered_at = now
                worker.breaker.succeed(sent_at)
            elif is_probe:
                worker.breaker.withdraw()
        self._leases.release(ended, now)
        for worker in touched.values():
            self._update(worker, now)

    def get_worker_address(self, model: str) -> str:
        """A worker for a request without a lease, as FastChat sends it; "" for none. Counted until its next
        heartbeat.
        """
        self.expire()
        worker = self._choice.choose(model, None, ())
        if worker is None:
            self._num_refused += 1
            return ""
        worker.sent_unleased += 1
        self._update(worker, self._clock())
        return worker.address

    # ---- queries ------------------------------------------------------------------------------------------------

    def serving(self, leases: Iterable[str]) -> list[str]:
        """The leases, of the given ones, that their workers listed in their last heartbeats."""
        self.expire()
        return [lease for lease in leases if self._leases.is_served(lease)]

    def list_models(self, *, multimodal: bool | None = None) -> list[str]:
        """Names of the models served, sorted; with `multimodal`, only by workers whose status has that value.

        Workers whose connection failed are included: they are back or dropped within a few heartbeats. Workers that
        still load are not.
        """
        self.expire()
        workers = (w for w in self._workers.values() if w.status.ready and multimodal in (None, w.status.multimodal))
        return sorted({name for worker in workers for name in worker.models})

    def table(self) -> RoutingTable:
        """Every worker that can take requests, with its leases."""
        self.expire()
        workers = []
        for address in self._rows.addresses():
            entry = self._entry(self._workers[address])
            status = entry.status.model_copy(update={"leases": self._leases.served(address)})
            workers.append(entry.model_copy(update={"status": status}))
        return RoutingTable.model_construct(
            dispatch_method=self._dispatch_method,
            workers=workers,
            epoch=self._epoch,
            version=self._rows.version,
            adapters_version=self._adapters.version,
            is_delta=False,
            removed=[],
        )

    def table_json(self, epoch: str, version: int) -> bytes:
        """The routing table as JSON, without leases: the changes since `version` of `epoch`, or all rows if these are
        not known.
        """
        self.expire()
        changes = self._rows.since(version) if epoch == self._epoch else None
        addresses, removed = (self._rows.addresses(), []) if changes is None else changes
        table = RoutingTable.model_construct(
            dispatch_method=self._dispatch_method,
            epoch=self._epoch,
            version=self._rows.version,
            adapters_version=self._adapters.version,
            is_delta=changes is not None,
            removed=removed,
        )
        rows = b",".join([self._row_json(self._workers[address]) for address in addresses])
        return table.model_dump_json(warnings=False).encode()[:-1] + b',"workers":[' + rows + b"]}"

    def adapters(self, known_version: int) -> AdapterTable:
        """The adapters that workers serve, unless the reader has this version."""
        self.expire()
        return self._adapters.table(known_version)

    def figures(self) -> Figures:
        """Counts for the metrics."""
        self.expire()
        now = self._clock()
        workers = [self._workers[address] for address in self._rows.addresses()]
        return Figures(
            workers=[
                WorkerFigures(w.address, self._in_flight(w), w.breaker.state(now), tuple(w.dispatched.items()))
                for w in workers
            ],
            num_leases=len(self._leases),
            num_refused=self._num_refused,
            num_breakers_opened=self._num_breakers_opened,
        )

    def addresses(self) -> list[str]:
        """All workers, including those whose connection failed."""
        self.expire()
        return list(self._workers)

    def knows(self, name: str) -> bool:
        """Whether a worker with this address is registered."""
        return name in self._workers

    @property
    def num_usable(self) -> int:
        """Workers that take requests."""
        self.expire()
        return len(self._rows)

    def expire(self) -> None:
        """Do what is due: drop workers that have been silent for too long, let breakers probe. The other methods that
        depend on it call it first.
        """
        now = self._clock()
        while self._wakes and self._wakes[0][0] <= now:
            when, _, worker = heapq.heappop(self._wakes)
            if when != worker.wake_at:
                continue  # it has another, earlier one, or is gone
            worker.wake_at = math.inf
            silent_s = now - worker.last_beat
            if worker.check_heart_beat and silent_s > self._patience_s(worker):
                self._remove(worker.address, f"it was silent for {silent_s:.1f} s")
            else:
                self._update(worker, now)
                self._schedule(worker, now)

    # ---- internals ----------------------------------------------------------------------------------------------

    def _check_room(self, name: str, status: WorkerStatus) -> None:
        worker = self._workers.get(name)
        if worker is None and len(self._workers) >= self._limits.max_workers:
            raise OverloadedError(
                f"The controller knows {self._limits.max_workers:,} workers and takes no more (--max-workers).",
                retry_after_s=10.0,
            )
        if worker is None or worker.status.model_names != status.model_names:
            self._models.check_room(dict.fromkeys(status.model_names))

    def _add(self, name: str, check_heart_beat: bool, status: WorkerStatus) -> WorkerRecord:
        worker = self._workers[name] = WorkerRecord(name, status, check_heart_beat, self._clock())
        self._log(logging.INFO, "Worker %s is registered. %s", *_named(worker))
        return worker

    def _remove(self, name: str, reason: str) -> None:
        now = self._clock()
        worker = self._workers[name]
        self._choice.place(worker, (), (), "", now)
        self._adapters.remove(name)
        del self._workers[name]
        worker.wake_at = math.inf
        self._rows.remove(name)
        self._leases.drop_worker(name)
        self._update_all(self._speeds.remove(name, now), now)
        address, models = _named(worker)
        self._log(logging.WARNING, "Worker %s is dropped: %s. %s", address, reason, models)

    def _sign_of_life(
        self,
        worker: WorkerRecord,
        queue_length: int,
        status: WorkerStatus | None,
        adapters: Sequence[AdapterEntry] | None = None,
    ) -> None:
        now = self._clock()
        if worker.failed_at is not None:
            self._log(logging.INFO, "Worker %s is back. %s", *_named(worker))
        is_new_status = status is not None
        worker.status = status = status or worker.status.model_copy(update={"queue_length": queue_length})
        worker.last_beat = now
        worker.failed_at = None
        worker.sent_unleased = 0
        interval = status.heartbeat_interval_s
        grace_s = max(LEASE_GRACE_HEARTBEATS * (interval or 0.0), MIN_LEASE_GRACE_S)
        if is_new_status and interval is not None:
            left_out = self._leases.reconcile(worker.address, status.leases, now, grace_s)
            worker.unleased = status.unleased + left_out
        else:
            # Without a list of leases: the queue length counts requests with and without a lease.
            self._leases.reconcile_count(worker.address, queue_length, now, grace_s)
            worker.unleased = max(0, queue_length - self._leases.count(worker.address))
        if status.leases:
            # Kept in `_leases`, which bounds them.
            worker.status = status = status.model_copy(update={"leases": []})
        names = status.model_names
        self._adapters.set(worker.address, names, status.adapters_digest, adapters)
        self._adapters.set_held(worker.address, status.held_adapters)
        adapter_list = self._adapters.list_of(worker.address)
        if (
            len(names) != len(worker.models)
            or any(map(str.__ne__, names, worker.models))
            or status.capabilities != worker.capabilities
            or adapter_list != worker.adapter_list
        ):
            has_new_names = tuple(names) != worker.models
            worker.capabilities = status.capabilities
            self._choice.place(worker, tuple(dict.fromkeys(names)), status.offered, adapter_list, now)
            if has_new_names:
                self._log_hidden_adapters(name for name in names if self._adapters.has_name(name))
        if adapters is not None:
            self._log_hidden_adapters(entry.name for entry in adapters if self._models.pools(entry.name))
        changed = self._speeds.set(worker.address, worker.models, status.tokens_per_s, status.speed, now)
        self._update(worker, now)
        self._update_all((address for address in changed if address != worker.address), now)
        self._schedule(worker, now)

    def _log_hidden_adapters(self, names: Iterable[str]) -> None:
        for name in names:
            self._log(
                logging.WARNING,
                "'%s' names a model and an adapter: requests get the model. Ask for the adapter as BASE:NAME, or "
                "rename one of them.",
                name,
            )

    def _update_all(self, addresses: Iterable[str], now: float) -> None:
        for address in addresses:
            self._update(self._workers[address], now)

    def _update(self, worker: WorkerRecord, now: float) -> None:
        """Update the dispatch indexes and the routing table with the worker's current state."""
        usable = self._is_usable(worker, now)
        address = worker.address
        if self._choice.update(
            worker, usable=usable, is_allowed=worker.breaker.is_closed or worker.breaker.allows(now)
        ):
            self._schedule(worker, now)
        if not usable:
            self._rows.remove(address)
            worker.row = ()
            return
        status = worker.status
        speed, in_flight = self._load_of(worker)
        state: BreakerState = "closed" if worker.breaker.is_closed else worker.breaker.state(now)
        row = (
            *(in_flight, state, worker.models, worker.capabilities),
            *(status.paused, status.multimodal, status.context_length, status.max_concurrency),
        )
        if row != worker.row or abs(speed - worker.row_speed) > SPEED_CHANGE * worker.row_speed:
            worker.row, worker.row_speed, worker.row_json = row, speed, None
            self._rows.put(address)

    def _failed_request(self, worker: WorkerRecord, now: float, sent_at: float | None) -> None:
        if worker.breaker.fail(now, sent_at):
            self._num_breakers_opened += 1
            worker.probe = None
            self._log(
                logging.WARNING, "Worker %s fails request after request: its breaker is open. %s", *_named(worker)
            )

    def _log(self, level: int, text: str, *values: str) -> None:
        """Log a line about a worker, at most MAX_LINES_PER_S: thousands may come or go at the same time."""
        now = self._clock()
        if now - self._log_second >= 1.0:
            if self._num_lines > MAX_LINES_PER_S:
                logger.warning("%d more lines about workers were left out.", self._num_lines - MAX_LINES_PER_S)
            self._log_second, self._num_lines = now, 0
        self._num_lines += 1
        if self._num_lines <= MAX_LINES_PER_S:
            logger.log(level, text, *values)

    def _schedule(self, worker: WorkerRecord, now: float) -> None:
        """Schedule a check of the worker for when its timeout or its breaker's probe is due, unless an earlier one is
        scheduled.
        """
        due = math.inf
        if worker.check_heart_beat:
            due = math.nextafter(worker.last_beat + self._patience_s(worker), math.inf)
        elif worker.failed_at is not None and not self._is_usable(worker, now):
            due = worker.failed_at + RETRY_S
        if not worker.breaker.is_closed:
            due = min(due, now + (worker.breaker.next_probe_s(now) or RETRY_S))
        if due < worker.wake_at:
            worker.wake_at = max(due, math.nextafter(now, math.inf))
            heapq.heappush(self._wakes, (worker.wake_at, next(self._sequence), worker))
            if len(self._wakes) > 2 * len(self._workers) + 64:
                waking = [w for w in self._workers.values() if w.wake_at < math.inf]
                self._wakes = [(w.wake_at, next(self._sequence), w) for w in waking]
                heapq.heapify(self._wakes)

    def _refusal(self, name: str, capability: str | None, now: float) -> AcquireResponse:
        pools = self._models.pools(name)
        if not pools:
            if not self._models.was_served(name, now):
                return AcquireResponse(address="", known=False)
            return AcquireResponse(address="", known=True, retry_after_s=LOADING_RETRY_AFTER_S)
        offering = pools.values() if capability is None else [pools[capability]] if capability in pools else []
        if not offering:
            assert capability is not None
            # The capabilities of a model may be unknown until it is loaded.
            if not self._models.was_served(name, now, capability) and not self._has_unstated(pools.values()):
                offered = sorted(pools)[:MAX_CAPABILITIES]
                return AcquireResponse(address="", known=True, capabilities=offered)
        is_loading = not any(
            pool.num_usable or any(self._workers[address].status.ready for address in pool.workers) for pool in offering
        )
        retry_after_s = LOADING_RETRY_AFTER_S if is_loading else BUSY_RETRY_AFTER_S
        return AcquireResponse(address="", known=True, retry_after_s=retry_after_s)

    def _has_unstated(self, pools: Iterable[Pool]) -> bool:
        """Whether a worker is loading and has not stated its capabilities yet."""
        statuses = (self._workers[address].status for pool in pools for address in pool.workers)
        return any(not status.ready and status.capabilities is None for status in statuses)

    def _entry(self, worker: WorkerRecord) -> WorkerEntry:
        return WorkerEntry.model_construct(
            address=worker.address,
            status=worker.status,
            in_flight=self._in_flight(worker),
            speed=self._speeds.speed(worker.address),
            breaker=worker.breaker.state(self._clock()),
        )

    def _row_json(self, worker: WorkerRecord) -> bytes:
        """The row as of its last change."""
        if worker.row_json is None:
            worker.row_json = (
                self._entry(worker).model_dump_json(exclude={"status": {"leases", "held_adapters"}}).encode()
            )
        return worker.row_json

    def _load_of(self, worker: WorkerRecord) -> tuple[float, int]:
        """Relative speed, and number of requests."""
        return self._speeds.speed(worker.address), self._in_flight(worker)

    def _in_flight(self, worker: WorkerRecord) -> int:
        # Capped at the most that API servers accept in a row.
        return min(self._leases.count(worker.address) + worker.unleased + worker.sent_unleased, MAX_REQUESTS)

    def _is_usable(self, worker: WorkerRecord, now: float) -> bool:
        if not worker.status.ready:
            return False
        if worker.failed_at is None:
            return True
        return not worker.check_heart_beat and now - worker.failed_at >= RETRY_S

    def _patience_s(self, worker: WorkerRecord) -> float:
        interval = worker.status.heartbeat_interval_s
        return self._heartbeat_expiration_s if interval is None else max(MISSED_HEARTBEATS * interval, MIN_EXPIRATION_S)


def _named(worker: WorkerRecord) -> tuple[str, str]:
    """Address and models, for a log line."""
    return printable(worker.address), f"Models: {printable(', '.join(worker.status.model_names)) or 'none'}."
