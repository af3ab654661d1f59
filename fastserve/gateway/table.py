"""Cached routing table, used while the controller is away or has just been restarted. No I/O."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import pydantic_core
from pydantic import ValidationError

from fastserve import dispatch
from fastserve.breaker import Breaker
from fastserve.observability.text import printable
from fastserve.protocol import MAX_WORKERS, RoutingTable, WorkerEntry
from fastserve.serving.errors import first_error

logger = logging.getLogger(__name__)

MISSING_GRACE_S = 10.0
"""How long a worker stays usable after it has left the controller's table: a restarted controller knows no worker
before the next heartbeat."""
SUSPECT_S = 3.0
"""How long other workers are preferred to one that has failed."""
SAMPLE_SIZE = 32
"""Number of random workers to choose from, if a model has more than twice as many."""
DEFAULT_METHOD = "shortest_queue"
"""Dispatch method before the first table, and if the controller's is unknown here."""
MAX_BREAKERS = 10_000


@dataclass(slots=True)
class _Row:
    entry: WorkerEntry
    others: int
    """Requests on the worker that did not come through this process, as of the last row."""
    missing_since: float | None = None


def parse_table(content: bytes) -> tuple[RoutingTable, list[str]]:
    """Parse a routing table; returns it without its invalid rows, and an error message for each of these.

    Raises InvalidRequestError if it is not a table at all.
    """
    try:
        return RoutingTable.model_validate_json(content), []
    except ValidationError as error:
        problem = first_error(error)
    try:
        raw = pydantic_core.from_json(content)
        rows = raw["workers"]
        table = RoutingTable.model_validate({**raw, "workers": []})
    except (ValueError, TypeError, KeyError):
        raise problem from None
    if not isinstance(rows, list):
        raise problem
    good, problems = [], []
    for row in rows[:MAX_WORKERS]:
        try:
            good.append(WorkerEntry.model_validate(row))
        except ValidationError as error:
            problems.append(first_error(error).message)
    return table.model_copy(update={"workers": good}), problems


class CachedTable:
    def __init__(self, clock: Callable[[], float], rng: random.Random) -> None:
        self._clock = clock
        self._rng = rng
        self._rows: dict[str, _Row] = {}
        self._missing: dict[str, float] = {}
        """Time at which each row was first missing from the controller's table."""
        self._by_model: dict[str, dict[str, list[str]]] | None = None
        """Addresses by model name and capability; None: outdated."""
        self._suspects: dict[str, float] = {}
        """Time until which other workers are preferred, by address."""
        self._method = DEFAULT_METHOD
        self._make_index = dispatch.load(DEFAULT_METHOD)
        self._breakers: dict[str, Breaker] = {}
        """By address, for workers that have failed requests of this process."""
        self.epoch = ""
        """Identifies the controller's table together with `version`."""
        self.version = -1

    def update(self, table: RoutingTable, in_flight: Mapping[str, int]) -> None:
        """Apply the controller's table, or its changes. `in_flight`: this process's own requests on each worker."""
        now = self._clock()
        self.epoch, self.version = table.epoch, table.version
        self._follow_method(table.dispatch_method)
        if table.is_delta:
            gone: Collection[str] = table.removed
        else:
            shown = {entry.address for entry in table.workers}
            gone = [address for address in self._rows if address not in shown]
        for address in gone:
            if (row := self._rows.get(address)) is not None and row.missing_since is None:
                row.missing_since = self._missing[address] = now
        for entry in table.workers:
            others = max(0, entry.in_flight - in_flight.get(entry.address, 0))
            before = self._rows.get(entry.address)
            self._rows[entry.address] = _Row(entry, others)
            self._missing.pop(entry.address, None)
            if before is None or before.missing_since is not None or not _offer_the_same(before.entry, entry):
                self._by_model = None
        for address in [address for address, since in self._missing.items() if now - since >= MISSING_GRACE_S]:
            del self._rows[address], self._missing[address]
            self._breakers.pop(address, None)
            self._by_model = None
        self._suspects = {address: until for address, until in self._suspects.items() if until > now}

    def suspect(self, address: str) -> None:
        """Prefer other workers for SUSPECT_S, because a connection to this one failed."""
        self._suspects[address] = self._clock() + SUSPECT_S

    def record(self, address: str, *, failed: bool) -> None:
        """Record the result of a request for the worker's local breaker, which matters while the controller is away."""
        breaker = self._breakers.get(address)
        if failed:
            if breaker is None and len(self._breakers) < MAX_BREAKERS:
                breaker = self._breakers[address] = Breaker()
            if breaker is not None:
                breaker.fail(self._clock())
        elif breaker is not None:
            del self._breakers[address]

    def choose(self, model: str, capability: str, exclude: Collection[str], in_flight: Mapping[str, int]) -> str:
        """Choose a worker that offers `capability` for `model` by the controller's dispatch method; "" for none.

        Workers that fail, that are paused, or that the controller no longer shows come after all others.
        """
        now = self._clock()
        addresses = self._offers().get(model, {}).get(capability, [])
        chosen = None
        if len(addresses) > 2 * SAMPLE_SIZE:
            sample = self._rng.sample(addresses, SAMPLE_SIZE)
            good = [address for address in sample if address not in exclude and not any(self._rank(address, now))]
            chosen = self._choose_among(good, in_flight)
        if chosen is None:
            by_rank: dict[tuple[bool, ...], list[str]] = {}
            for address in addresses:
                if address not in exclude:
                    by_rank.setdefault(self._rank(address, now), []).append(address)
            choices = (self._choose_among(by_rank[rank], in_flight) for rank in sorted(by_rank))
            chosen = next((choice for choice in choices if choice is not None), "")
        if breaker := self._breakers.get(chosen):
            breaker.start(now)
        return chosen

    def _rank(self, address: str, now: float) -> tuple[bool, ...]:
        """Reasons to prefer other workers, the most serious first."""
        row, breaker = self._rows[address], self._breakers.get(address)
        is_out = row.entry.breaker == "open" if breaker is None else not breaker.allows(now)
        is_suspect = self._suspects.get(address, now) > now
        return is_out, is_suspect, row.entry.status.paused, row.missing_since is not None

    def _choose_among(self, addresses: Collection[str], in_flight: Mapping[str, int]) -> str | None:
        index = self._make_index()
        for address in addresses:
            row = self._rows[address]
            index.set(address, row.entry.speed, row.others + in_flight.get(address, 0))
        return index.choose((), self._rng)

    def _follow_method(self, method: str) -> None:
        if method == self._method:
            return
        self._method = method
        is_known = method in dispatch.names()
        if not is_known:
            logger.warning("The controller's dispatch method %s is not known here.", printable(method))
        self._make_index = dispatch.load(method if is_known else DEFAULT_METHOD)

    def model_names(self) -> list[str]:
        """Sorted and unique. Rows missing from the last table count only if it was empty (a restarted controller)."""
        return sorted(self.offered())

    def offered(self) -> dict[str, list[str]]:
        """The models of `model_names`, with the capabilities that they are served with."""
        is_counted = self._is_counted()
        found = (
            (name, [capability for capability, addresses in pools.items() if any(map(is_counted, addresses))])
            for name, pools in self._offers().items()
        )
        return {name: capabilities for name, capabilities in found if capabilities}

    def capabilities(self, model: str) -> list[str]:
        """Capabilities that the model is served with, sorted; empty for a model that is not served."""
        is_counted = self._is_counted()
        pools = self._offers().get(model, {})
        return sorted(capability for capability, addresses in pools.items() if any(map(is_counted, addresses)))

    def first_names(self) -> list[str]:
        """The first model name of each worker, sorted and unique."""
        names = (row.entry.status.model_names for address, row in self._rows.items() if self.is_listed(address))
        return sorted({of_worker[0] for of_worker in names if of_worker})

    def workers_of(self, model: str) -> list[str]:
        """Addresses of the listed workers that serve the model, sorted."""
        rows = self._rows.items()
        return sorted(a for a, row in rows if self.is_listed(a) and model in row.entry.status.model_names)

    def context_length(self, model: str) -> int | None:
        """The least of the workers that serve the model; None if none says it."""
        addresses = {address for pool in self._offers().get(model, {}).values() for address in pool}
        lengths = (self._rows[address].entry.status.context_length for address in addresses)
        return min((length for length in lengths if length is not None), default=None)

    def load_of(self, address: str, in_flight: Mapping[str, int]) -> int:
        """Requests on the worker: this process's own, and the others as of its last row."""
        row = self._rows.get(address)
        return in_flight.get(address, 0) + (0 if row is None else row.others)

    def is_listed(self, address: str) -> bool:
        """Whether the worker is in the controller's last table."""
        return address in self._rows and address not in self._missing

    def _is_counted(self) -> Callable[[str], bool]:
        only_missing = len(self._missing) == len(self._rows)
        return lambda address: only_missing or address not in self._missing

    def _offers(self) -> dict[str, dict[str, list[str]]]:
        if self._by_model is None:
            self._by_model = {}
            for address, row in self._rows.items():
                status = row.entry.status
                for name in dict.fromkeys(status.model_names):
                    pools = self._by_model.setdefault(name, {})
                    for capability in dict.fromkeys(status.offered):
                        pools.setdefault(capability, []).append(address)
        return self._by_model


def _offer_the_same(one: WorkerEntry, other: WorkerEntry) -> bool:
    before, after = one.status, other.status
    return before.model_names == after.model_names and before.capabilities == after.capabilities
