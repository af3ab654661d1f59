"""Whatever happens in whatever order, the counts of requests become right again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastserve.control.registry import RegistryLimits, WorkerRegistry
from fastserve.protocol import WorkerStatus

INTERVAL_S = 1.0
LIMITS = RegistryLimits(max_workers=10, max_model_names=10, max_leases=100_000, model_memory_s=600.0)
NAMES = ("w1", "w2", "w3")
WORKERS = st.sampled_from(NAMES)


@dataclass
class SimulatedWorker:
    """The true state of a worker: its requests, and heartbeats that have been sent but have not arrived."""

    running: set[str] = field(default_factory=set)
    others: int = 0
    on_the_way: list[WorkerStatus] = field(default_factory=list)

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            model_names=["m"],
            queue_length=len(self.running) + self.others,
            heartbeat_interval_s=INTERVAL_S,
            leases=sorted(self.running),
        )


class Cluster(RuleBasedStateMachine):
    @initialize(seed=st.integers())
    def start(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.workers = {name: SimulatedWorker() for name in NAMES}
        self.requests: dict[str, str] = {}
        """Worker by lease, for the requests that an API server has."""
        self.count = 0
        self.start_controller()
        for name in NAMES:
            self.heartbeat(name)

    @rule()
    def start_controller(self) -> None:
        self.registry = WorkerRegistry(
            dispatch_method="shortest_queue",
            heartbeat_expiration_s=90.0,
            limits=LIMITS,
            clock=lambda: self.now,
            rng=self.rng,
        )

    @rule(seconds=st.sampled_from([0.125, 0.5, 1.0, 2.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(arrives=st.booleans())
    def acquire(self, arrives: bool) -> None:
        self.count += 1
        lease = f"lease{self.count}"
        if address := self.registry.acquire("m", lease).address:
            self.requests[lease] = address
            if arrives:
                self.workers[address].running.add(lease)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def request_reaches_its_worker(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.requests)))
        self.workers[self.requests[lease]].running.add(lease)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def request_is_retried_elsewhere(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.requests)))
        failed = self.requests[lease]
        self.registry.report_failure(failed)
        if address := self.registry.acquire("m", lease, [failed]).address:
            self.requests[lease] = address
        else:
            del self.requests[lease]

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), is_released=st.booleans(), worker_knows=st.booleans())
    def request_ends(self, data: st.DataObject, is_released: bool, worker_knows: bool) -> None:
        """Without `is_released` its API server has died; the worker may notice the end later."""
        lease = data.draw(st.sampled_from(sorted(self.requests)))
        address = self.requests.pop(lease)
        if worker_knows:
            self.workers[address].running.discard(lease)
        if is_released:
            self.registry.release([lease])

    @rule(name=WORKERS, count=st.integers(0, 3))
    def traffic_past_the_controller(self, name: str, count: int) -> None:
        self.workers[name].others = count

    @rule()
    def fastchats_dispatch(self) -> None:
        self.registry.get_worker_address("m")

    @rule(name=WORKERS)
    def heartbeat_leaves(self, name: str) -> None:
        self.workers[name].on_the_way.append(self.workers[name].status())

    @rule(name=WORKERS)
    def heartbeats_arrive(self, name: str) -> None:
        for status in self.workers[name].on_the_way:
            self.registry.heartbeat(name, status.queue_length, status)
        self.workers[name].on_the_way.clear()

    @rule(name=WORKERS)
    def heartbeat(self, name: str) -> None:
        self.heartbeat_leaves(name)
        self.heartbeats_arrive(name)

    @rule(name=WORKERS)
    def worker_restarts(self, name: str) -> None:
        self.workers[name] = SimulatedWorker()
        self.registry.register(name, True, self.workers[name].status())

    @rule(name=WORKERS)
    def worker_shuts_down(self, name: str) -> None:
        self.registry.deregister(name)

    @rule(name=WORKERS)
    def connection_fails(self, name: str) -> None:
        self.registry.report_failure(name)

    @invariant()
    def counts_agree_with_the_leases(self) -> None:
        if not hasattr(self, "registry"):
            return
        for worker in self.registry.table().workers:
            assert worker.in_flight >= 0
        leases = self.registry._leases
        held = [(lease, worker) for worker, own in leases._by_worker.items() for lease in own.since]
        assert dict(held) == leases._owner
        assert len(held) == len(leases._owner), "a lease is on two workers"
        assert {worker for _, worker in held} <= set(self.registry.addresses())

    def teardown(self) -> None:
        """All requests end, heartbeats on the way arrive, and two more of each worker bring every count to zero."""
        if not hasattr(self, "registry"):
            return
        for name, worker in self.workers.items():
            self.heartbeats_arrive(name)
            worker.running.clear()
            worker.others = 0
        for _ in range(2):
            self.now += INTERVAL_S
            for name, worker in self.workers.items():
                self.registry.heartbeat(name, 0, worker.status())
        assert {w.address: w.in_flight for w in self.registry.table().workers} == dict.fromkeys(self.workers, 0)


Cluster.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestCluster = Cluster.TestCase
