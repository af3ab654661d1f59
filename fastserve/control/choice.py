"""The choice of a worker for a request, by the dispatch policy.

The workers that serve a model form a pool for each capability, with an index of the policy; so do those with one list
of adapters. A request for an adapter gets one of the workers that serve it, by the policy, or one of those that have it
in memory, by the policy too, unless that one is much busier.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from fastserve.breaker import fleet_allows
from fastserve.control.adapters import AdapterDirectory, AdapterPlaces
from fastserve.control.models import Pool, ServedModels
from fastserve.control.workers import WorkerRecord
from fastserve.dispatch import DispatchIndex

MAX_HOLDER_LEAD = 4.0
"""Requests, relative to speed, by which a worker that has an adapter in memory may be busier than one that the policy
chooses of all, and still gets the adapter's next request. `python -m benchmarks.adapter_dispatch` compares leads."""
SAMPLE_SIZE = 32
"""Number of random holders of an adapter, and of lists of adapters, that are compared for a request, if there are more
than twice as many."""


class WorkerChoice:
    """The pools of all workers. No clock: callers pass the time, in monotonic seconds."""

    def __init__(
        self,
        make_index: Callable[[], DispatchIndex],
        models: ServedModels,
        adapters: AdapterDirectory,
        workers: Mapping[str, WorkerRecord],
        load_of: Callable[[WorkerRecord], tuple[float, int]],
        rng: random.Random,
    ) -> None:
        """`load_of` gives a worker's relative speed and its number of requests."""
        self._make_index = make_index
        self._models = models
        self._adapters = adapters
        self._adapter_lists = ServedModels(make_index, max_models=0, memory_s=0.0)
        self._workers = workers
        self._load_of = load_of
        self._rng = rng

    # ---- pools --------------------------------------------------------------------------------------------------

    def place(
        self, worker: WorkerRecord, names: tuple[str, ...], capabilities: Iterable[str], adapter_list: str, now: float
    ) -> None:
        """Put the worker into the pools of these models, of this list of adapters ("" for none) and of these
        capabilities, and take it out of all others.
        """
        keys = (*names, adapter_list) if adapter_list else names
        offered = dict.fromkeys(itertools.product(keys, capabilities))
        served = frozenset(keys)
        for name, capability in worker.pools.keys() - offered.keys():
            self._set_usable(worker.pools.pop((name, capability)), worker, False)
            owner = self._owner(name, worker.adapter_list)
            owner.discard(name, capability, worker.address, now, is_withdrawn=name in served)
        for name, capability in offered:
            if (name, capability) not in worker.pools:
                owner = self._owner(name, adapter_list)
                worker.pools[name, capability] = owner.add(name, capability, worker.address)
        worker.dispatched = {name: count for name, count in worker.dispatched.items() if name in served}
        worker.models, worker.adapter_list = names, adapter_list

    def _owner(self, name: str, adapter_list: str) -> ServedModels:
        return self._adapter_lists if adapter_list and name == adapter_list else self._models

    def update(self, worker: WorkerRecord, *, usable: bool, is_allowed: bool) -> bool:
        """Update the worker's pools with its load. Without `is_allowed` (its breaker) it is ejected where the fleet
        can spare it; returns whether that is new somewhere.
        """
        address, is_newly_ejected = worker.address, False
        speed, in_flight = self._load_of(worker)
        for pool in worker.pools.values():
            if pool.workers[address] != usable:
                self._set_usable(pool, worker, usable)
            if not usable:
                continue
            if is_allowed:
                pool.ejected.pop(address, None)
            elif address not in pool.ejected and fleet_allows(len(pool.ejected), pool.num_usable):
                pool.ejected[address] = None
                is_newly_ejected = True
            if address in pool.ejected:
                pool.remove(address)
            else:
                pool.set(address, speed, in_flight, is_paused=worker.status.paused)
        return is_newly_ejected

    def _set_usable(self, pool: Pool, worker: WorkerRecord, usable: bool) -> None:
        """Mark the worker as usable, or not, in one of its pools."""
        if pool.workers[worker.address] == usable:
            return
        pool.workers[worker.address] = usable
        pool.num_usable += 1 if usable else -1
        if usable:
            return
        pool.remove(worker.address)
        pool.ejected.pop(worker.address, None)
        while 2 * len(pool.ejected) > pool.num_usable:
            # The pool has shrunk: put ejected workers back until at most half of it is ejected.
            address = next(iter(pool.ejected))
            del pool.ejected[address]
            other = self._workers[address]
            pool.set(address, *self._load_of(other), is_paused=other.status.paused)

    # ---- choices ------------------------------------------------------------------------------------------------

    def choose(self, model: str, capability: str | None, exclude: Collection[str]) -> WorkerRecord | None:
        """A worker for a request to a model or an adapter, none of `exclude`; None if there is none."""
        exclude = frozenset(exclude)
        pools = self._models.pools(model)
        places = None if pools else self._adapters.find(model)
        if places is None:
            address = self._choose_from(_offering(pools, capability), exclude)
        else:
            address = self._choose_for_adapter(places, capability, exclude)
        if address is None:
            return None
        worker = self._workers[address]
        name = model if places is None else worker.models[0]
        worker.dispatched[name] = worker.dispatched.get(name, 0) + 1
        return worker

    def base_of(self, model: str) -> str:
        """The base model of an adapter; other names unchanged."""
        places = None if self._models.pools(model) else self._adapters.find(model)
        return model if places is None else self._adapters.base_of(places)

    def _choose_from(self, pools: Sequence[Pool], exclude: Collection[str]) -> str | None:
        """By the policy; a paused worker only if there is no other."""
        indexes = itertools.chain((pool.index for pool in pools), (pool.paused_index for pool in pools))
        choices = (index.choose(exclude, self._rng) for index in indexes)
        return next((address for address in choices if address is not None), None)

    def _choose_for_adapter(
        self, places: AdapterPlaces, capability: str | None, exclude: Collection[str]
    ) -> str | None:
        best = self._choose_of_lists(places.lists.sample(SAMPLE_SIZE, self._rng), capability, exclude)
        if best is None and len(places.lists) > SAMPLE_SIZE:
            best = self._choose_of_lists(places.lists, capability, exclude)
        if best is None:
            return None
        is_paused = self._workers[best].status.paused
        holder = self._choose_among(
            [
                address
                for address in self._adapters.holders(places.name, SAMPLE_SIZE, self._rng)
                if address not in exclude and self._is_like(address, places, capability, is_paused=is_paused)
            ]
        )
        return best if holder is None or self._wait(holder) > self._wait(best) + MAX_HOLDER_LEAD else holder

    def _choose_of_lists(self, lists: Iterable[str], capability: str | None, exclude: Collection[str]) -> str | None:
        """The best worker among those with any of these lists of adapters."""
        found = (self._choose_from(self._offering_list(key, capability), exclude) for key in lists)
        return self._choose_among([address for address in found if address is not None])

    def _is_like(self, address: str, places: AdapterPlaces, capability: str | None, *, is_paused: bool) -> bool:
        """Whether the worker could have been chosen of those that serve the adapter, and is paused or not."""
        worker = self._workers[address]
        return (
            worker.status.paused == is_paused
            and worker.adapter_list in places.lists
            and any(
                pool.workers[address] and address not in pool.ejected
                for pool in self._offering_list(worker.adapter_list, capability)
            )
        )

    def _offering_list(self, key: str, capability: str | None) -> list[Pool]:
        return _offering(self._adapter_lists.pools(key), capability)

    def _choose_among(self, addresses: Sequence[str]) -> str | None:
        """By the policy, in time proportional to the number of addresses."""
        if len(addresses) < 2:
            return addresses[0] if addresses else None
        index = self._make_index()
        for address in addresses:
            index.set(address, *self._load_of(self._workers[address]))
        return index.choose((), self._rng)

    def _wait(self, address: str) -> float:
        speed, in_flight = self._load_of(self._workers[address])
        return in_flight / speed if speed > 0 else math.inf


def _offering(pools: Mapping[str, Pool], capability: str | None) -> list[Pool]:
    if capability is None:
        return list(pools.values())
    return [pools[capability]] if capability in pools else []
