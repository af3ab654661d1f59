"""Many workers: changes of the table, remembered models, cost, and memory."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.control import changes
from fastserve.control.changes import ChangeLog
from fastserve.control.registry import MAX_LINES_PER_S, WorkerRegistry
from fastserve.protocol import RoutingTable, WorkerStatus


class Clock(Protocol):
    now: float


MakeStatus = Callable[..., WorkerStatus]


def read(registry: WorkerRegistry, epoch: str = "", version: int = -1) -> RoutingTable:
    return RoutingTable.model_validate_json(registry.table_json(epoch, version))


# ---- changes of the table ---------------------------------------------------------------------------------------


class Reader:
    """An API server's copy of the table, updated with changes only."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self.registry = registry
        self.epoch, self.version = "", -1
        self.rows: dict[str, tuple[int, str]] = {}
        self.num_rows_read = 0

    def poll(self) -> None:
        table = read(self.registry, self.epoch, self.version)
        if not table.is_delta:
            self.rows.clear()
        for address in table.removed:
            self.rows.pop(address, None)
        for row in table.workers:
            self.rows[row.address] = (row.in_flight, row.breaker)
        self.num_rows_read += len(table.workers)
        self.epoch, self.version = table.epoch, table.version


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["beat", "acquire", "release", "failure", "goodbye", "loading", "wait", "poll"]),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(steps=STEPS)
def test_a_reader_of_changes_has_the_whole_table(steps: list[tuple[str, int]]) -> None:
    clock = [0.0]
    registry = _registry(lambda: clock[0])
    reader = Reader(registry)
    count = 0
    for step, number in steps:
        name = f"w{number}"
        if step in ("beat", "loading"):
            status = WorkerStatus(model_names=["m"], heartbeat_interval_s=1.0, ready=step == "beat")
            registry.heartbeat(name, 0, status)
        elif step == "acquire":
            count += 1
            registry.acquire("m", str(count))
        elif step == "release":
            registry.release([str(number)], failed=[str(number)])
        elif step == "failure":
            registry.report_failure(name)
        elif step == "goodbye":
            registry.deregister(name)
        elif step == "wait":
            clock[0] += number
        else:
            reader.poll()
    reader.poll()
    assert reader.rows == {row.address: (row.in_flight, row.breaker) for row in registry.table().workers}


def _registry(clock: Callable[[], float]) -> WorkerRegistry:
    from tests.control.test_registry_properties import LIMITS

    return WorkerRegistry(
        dispatch_method="shortest_queue", heartbeat_expiration_s=90.0, limits=LIMITS, clock=clock, rng=random.Random(0)
    )


def test_only_changed_rows_are_sent(registry: WorkerRegistry, status: MakeStatus) -> None:
    for number in range(100):
        registry.heartbeat(f"w{number}", 0, status())
    reader = Reader(registry)
    reader.poll()
    assert reader.num_rows_read == 100
    for number in range(100):
        registry.heartbeat(f"w{number}", 0, status(kv_usage=number / 100))
    reader.poll()
    assert reader.num_rows_read == 100, "a heartbeat that changes nothing that readers use"
    registry.acquire("m", "1")
    registry.heartbeat("w7", 0, status(models=("m", "n")))
    reader.poll()
    assert reader.num_rows_read in (101, 102)


def test_rows_carry_no_leases_but_the_whole_table_does(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", 2, status("1", "2"))
    assert read(registry).workers[0].status.leases == []
    assert read(registry).workers[0].in_flight == 2
    assert registry.table().workers[0].status.leases == ["1", "2"]


def test_another_controllers_version_gives_the_whole_table(
    make_registry: Callable[..., WorkerRegistry], registry: WorkerRegistry, status: MakeStatus
) -> None:
    registry.heartbeat("w", 0, status())
    table = read(registry)
    for epoch, version in [("", table.version), ("other", table.version), (table.epoch, 99), (table.epoch, -1)]:
        again = read(registry, epoch, version)
        assert (again.is_delta, len(again.workers)) == (False, 1)
    again = read(registry, table.epoch, table.version)
    assert (again.is_delta, again.workers, again.removed) == (True, [], [])


def test_a_version_before_the_remembered_ones_gives_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_REMOVED", 3)
    log = ChangeLog()
    for number in range(6):
        log.put(f"w{number}")
    versions = []
    for number in range(5):
        versions.append(log.version)
        log.remove(f"w{number}")
    assert log.since(versions[1]) is None
    assert log.since(versions[2]) == ([], ["w4", "w3", "w2"])
    log.put("w2")
    assert log.since(versions[2]) == (["w2"], ["w4", "w3"])


# ---- leases -----------------------------------------------------------------------------------------------------


def test_which_leases_are_being_served(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", 0, status())
    registry.acquire("m", "on its way")
    registry.acquire("m", "served")
    registry.heartbeat("w", 1, status("served"))
    assert registry.serving(["on its way", "served", "unknown"]) == ["served"]
    registry.heartbeat("w", 0, status())
    assert registry.serving(["served"]) == []


# ---- models that are known --------------------------------------------------------------------------------------


def test_a_model_that_still_loads_is_known_and_not_served(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", 0, status(ready=False))
    answer = registry.acquire("m", "1")
    assert (answer.address, answer.known) == ("", True)
    assert answer.retry_after_s is not None
    assert answer.retry_after_s > 1
    assert registry.list_models() == []
    assert registry.table().workers == []
    registry.heartbeat("w", 0, status())
    assert registry.acquire("m", "1").address == "w"
    registry.heartbeat("w", 1, status("1", ready=False))
    assert registry.acquire("m", "2").address == ""


def test_a_model_whose_last_worker_is_gone_is_known_for_a_while(
    make_registry: Callable[..., WorkerRegistry], status: MakeStatus, clock: Clock
) -> None:
    registry = make_registry(model_memory_s=600.0)
    registry.heartbeat("w", 0, status(models=("m", "alias")))
    clock.now += 10.0
    for name in ("m", "alias"):
        answer = registry.acquire(name, "1")
        assert (answer.address, answer.known) == ("", True)
        assert answer.retry_after_s
    clock.now += 600.0
    assert not registry.acquire("m", "1").known
    assert registry.acquire("m", "1").retry_after_s is None


def test_names_that_are_known_are_bounded(make_registry: Callable[..., WorkerRegistry], status: MakeStatus) -> None:
    registry = make_registry(max_model_names=10)
    for number in range(50):
        registry.heartbeat("w", 0, status(models=(f"m{number}",)))
    assert [number for number in range(50) if registry.acquire(f"m{number}", "1").known] == list(range(39, 50))


def test_when_all_that_could_are_excluded_another_try_is_soon(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("a", 0, status())
    assert registry.acquire("m", "1", ["a"]).retry_after_s == 1.0
    assert registry.acquire("m", "1").retry_after_s is None


# ---- cost and memory --------------------------------------------------------------------------------------------


def _count_steps(work: Callable[[], object]) -> int:
    """Count the Python lines and calls of some work: a cost that does not depend on the machine's load."""
    count = 0

    def trace(*_: object) -> Any:
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("dispatch_method", ["shortest_queue", "lottery"])
def test_a_heartbeat_and_a_choice_cost_hardly_more_with_many_workers(
    make_registry: Callable[..., WorkerRegistry], status: MakeStatus, clock: Clock, dispatch_method: str
) -> None:
    def steps(num_workers: int) -> int:
        registry = make_registry(dispatch_method)
        statuses = [status(tokens_per_s=100.0 + number % 7) for number in range(num_workers)]
        for number, one in enumerate(statuses):
            registry.heartbeat(f"w{number}", 0, one)
        clock.now += 1.5
        for number, one in enumerate(statuses):
            registry.heartbeat(f"w{number}", 0, one)
        table = read(registry)

        def work() -> None:
            for number in range(20):
                clock.now += 0.01
                registry.heartbeat(f"w{number}", 0, status(tokens_per_s=100.0 + number))
                registry.acquire("m", f"lease{number}", ["w1", "w2"])
                registry.release([f"lease{number}"])
            registry.table_json(table.epoch, table.version)

        return _count_steps(work)

    assert steps(4000) < 2 * steps(40)


def test_workers_that_come_and_go_leave_nothing_behind(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock
) -> None:
    for number in range(3000):
        name = f"w{number % 500}-{number}"
        registry.heartbeat(name, 1, status(f"lease{number}", models=(f"m{number % 3}",), heartbeat_interval_s=3000.0))
        registry.acquire(f"m{number % 3}", f"own{number}")
        registry.deregister(name)
        clock.now += 0.01
    assert registry.addresses() == []
    assert len(registry._wakes) < 200
    assert len(registry._leases) == 0
    assert len(registry._rows) == 0
    assert registry._speeds._members == {}
    assert registry._speeds._group_of == {}
    assert registry._models._models == {}


def test_all_silent_workers_are_dropped_at_once(registry: WorkerRegistry, status: MakeStatus, clock: Clock) -> None:
    for number in range(200):
        registry.heartbeat(f"w{number}", 0, status(heartbeat_interval_s=1.0 + number % 2))
    registry.heartbeat("alive", 0, status(heartbeat_interval_s=100.0))
    clock.now += 3.1
    assert registry.num_usable == 101
    clock.now += 3.0
    assert registry.addresses() == ["alive"]
    assert json.loads(registry.table_json("", -1))["workers"][0]["address"] == "alive"


def test_a_shorter_interval_counts_from_the_heartbeat_that_reports_it(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock
) -> None:
    registry.heartbeat("w", 0, status(heartbeat_interval_s=1000.0))
    registry.heartbeat("w", 0, status(heartbeat_interval_s=1.0))
    clock.now += 3.1
    assert registry.addresses() == []


def test_thousands_that_come_at_once_do_not_flood_the_log(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for number in range(1000):
        registry.heartbeat(f"w{number}", 0, status(heartbeat_interval_s=100.0))
    assert len(caplog.records) == MAX_LINES_PER_S
    clock.now += 1.0
    registry.deregister("w1")
    assert [record.getMessage() for record in caplog.records][MAX_LINES_PER_S:] == [
        f"{1000 - MAX_LINES_PER_S} more lines about workers were left out.",
        "Worker w1 is dropped: it said goodbye. Models: m.",
    ]
