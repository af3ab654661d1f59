"""Circuit breakers: which workers are taken out of dispatch, for how long, and which come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import pytest

from fastserve.breaker import FAILURE_THRESHOLD, OPEN_S, PROBE_TIMEOUT_S
from fastserve.control.registry import REPORT_MEMORY_S, WorkerRegistry
from fastserve.protocol import WorkerStatus


class Clock(Protocol):
    now: float


MakeStatus = Callable[..., WorkerStatus]


@pytest.fixture
def beat(registry: WorkerRegistry, status: MakeStatus) -> Callable[..., None]:
    def make(*names: str, **fields: object) -> None:
        for name in names:
            registry.heartbeat(name, 0, status(heartbeat_interval_s=1000.0, **fields))

    return make


def fail(registry: WorkerRegistry, address: str, times: int = FAILURE_THRESHOLD, model: str = "m") -> None:
    """Let `times` requests fail on this worker."""
    while times:
        lease = f"failing{times}"
        if registry.acquire(model, lease, [other for other in registry.addresses() if other != address]).address:
            registry.release([lease], failed=[lease])
        times -= 1


def chosen(registry: WorkerRegistry, count: int = 60, model: str = "m") -> Counter[str]:
    """Number of requests on each worker, for `count` requests that are neither successes nor failures."""
    found: Counter[str] = Counter()
    for number in range(count):
        lease = f"asked{number}"
        found[registry.acquire(model, lease).address] += 1
        registry.release([lease], unused=[lease])
    return found


def breakers(registry: WorkerRegistry) -> dict[str, str]:
    return {row.address: row.breaker for row in registry.table().workers}


def test_a_worker_that_fails_request_after_request_gets_no_more(
    registry: WorkerRegistry, beat: Callable[..., None]
) -> None:
    beat("a", "b")
    fail(registry, "a", FAILURE_THRESHOLD - 1)
    assert set(chosen(registry)) == {"a", "b"}
    fail(registry, "a", 1)
    assert set(chosen(registry)) == {"b"}
    assert breakers(registry) == {"a": "open", "b": "closed"}
    assert registry.figures().num_breakers_opened == 1


def test_a_heartbeat_does_not_bring_it_back(registry: WorkerRegistry, beat: Callable[..., None]) -> None:
    beat("a", "b")
    fail(registry, "a")
    beat("a", "b")
    assert set(chosen(registry)) == {"b"}


def test_an_answer_between_failures_and_a_departed_client_count_as_they_should(
    registry: WorkerRegistry, beat: Callable[..., None]
) -> None:
    beat("a", "b")
    for _ in range(3):
        fail(registry, "a", FAILURE_THRESHOLD - 1)
        registry.acquire("m", "gone", ["b"])
        registry.release(["gone"], unused=["gone"])
        assert breakers(registry)["a"] == "closed"
        registry.acquire("m", "good", ["b"])
        registry.release(["good"])
    fail(registry, "a", FAILURE_THRESHOLD - 1)
    registry.acquire("m", "gone", ["b"])
    registry.release(["gone"], unused=["gone"])
    fail(registry, "a", 1)
    assert breakers(registry)["a"] == "open"


def test_one_request_probes_it_and_its_answer_closes_the_breaker(
    registry: WorkerRegistry, beat: Callable[..., None], clock: Clock
) -> None:
    beat("a", "b")
    fail(registry, "a")
    clock.now += OPEN_S + 0.01
    assert breakers(registry)["a"] == "half-open"
    assert registry.acquire("m", "probe", ["b"]).address == "a"
    assert registry.acquire("m", "second", ["b"]).address == ""
    registry.release(["probe"])
    assert breakers(registry)["a"] == "closed"
    assert set(chosen(registry)) == {"a", "b"}


def test_a_probe_that_fails_keeps_it_out_for_longer(
    registry: WorkerRegistry, beat: Callable[..., None], clock: Clock
) -> None:
    beat("a", "b")
    fail(registry, "a")
    clock.now += OPEN_S + 0.01
    registry.acquire("m", "probe", ["b"])
    registry.release(["probe"], failed=["probe"])
    clock.now += OPEN_S + 0.01
    assert set(chosen(registry)) == {"b"}
    clock.now += OPEN_S
    assert registry.acquire("m", "probe", ["b"]).address == "a"


def test_a_probe_without_a_result_is_followed_by_another(
    registry: WorkerRegistry, beat: Callable[..., None], clock: Clock
) -> None:
    beat("a", "b")
    fail(registry, "a")
    clock.now += OPEN_S + 0.01
    registry.acquire("m", "left", ["b"])
    registry.release(["left"], unused=["left"])
    assert registry.acquire("m", "lost", ["b"]).address == "a"
    clock.now += PROBE_TIMEOUT_S + 0.01
    assert registry.acquire("m", "third", ["b"]).address == "a"


def test_an_answer_to_a_request_from_before_does_not_close_the_breaker(
    registry: WorkerRegistry, beat: Callable[..., None], clock: Clock
) -> None:
    beat("a", "b")
    registry.acquire("m", "long", ["b"])
    clock.now += 1
    fail(registry, "a")
    clock.now += 1
    registry.release(["long"])
    assert set(chosen(registry)) == {"b"}


@pytest.mark.parametrize(("num_workers", "max_out"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_never_more_than_half_of_a_models_workers_are_out(
    registry: WorkerRegistry, beat: Callable[..., None], num_workers: int, max_out: int
) -> None:
    names = [f"w{n}" for n in range(num_workers)]
    beat(*names)
    for _ in range(2):
        for name in names:
            fail(registry, name)
    assert len(chosen(registry, 400)) == num_workers - max_out


def test_a_worker_may_be_out_for_one_model_and_in_for_another_that_nobody_else_serves(
    registry: WorkerRegistry, beat: Callable[..., None]
) -> None:
    beat("a", models=("m", "only"))
    beat("b")
    fail(registry, "a")
    assert set(chosen(registry)) == {"b"}
    assert set(chosen(registry, model="only")) == {"a"}


def test_when_the_healthy_ones_go_a_failing_one_is_better_than_none(
    registry: WorkerRegistry, beat: Callable[..., None]
) -> None:
    beat("a", "b")
    fail(registry, "a")
    registry.deregister("b")
    assert set(chosen(registry)) == {"a"}
    beat("b")
    fail(registry, "a", 1)
    registry.report_failure("b")
    assert set(chosen(registry)) == {"a"}


def test_lost_connections_feed_the_breaker(registry: WorkerRegistry, beat: Callable[..., None]) -> None:
    """Heartbeats of the worker arrive although nobody can connect to it."""
    beat("a", "b")
    for _ in range(FAILURE_THRESHOLD):
        registry.report_failure("a")
        assert set(chosen(registry)) == {"b"}
        beat("a")
    assert set(chosen(registry)) == {"b"}


def test_a_lost_connection_that_is_reported_counts_once(
    registry: WorkerRegistry, beat: Callable[..., None], clock: Clock
) -> None:
    """The API server reports the failure at once, and releases the lease as failed a moment later."""
    beat("a", "b")
    for number in range(FAILURE_THRESHOLD):
        assert breakers(registry)["a"] == "closed", number
        registry.acquire("m", f"lost{number}", ["b"])
        clock.now += 0.1
        registry.report_failure("a")
        clock.now += 0.1
        registry.release([f"lost{number}"], failed=[f"lost{number}"])
        clock.now += 0.1
        beat("a")
    assert breakers(registry)["a"] == "open"


def test_a_worker_that_serves_others_is_not_taken_out_again_and_again_by_one_that_cannot_reach_it(
    registry: WorkerRegistry, beat: Callable[..., None], clock: Clock
) -> None:
    beat("a", "b")
    registry.report_failure("a")
    assert set(chosen(registry)) == {"b"}
    beat("a")
    for number in range(20):
        clock.now += 0.1
        registry.acquire("m", f"other{number}", ["b"])
        registry.release([f"other{number}"])
        clock.now += 0.1
        registry.report_failure("a")
        assert set(chosen(registry)) == {"a", "b"}
    clock.now += REPORT_MEMORY_S
    registry.report_failure("a")
    assert set(chosen(registry)) == {"b"}


def test_a_breaker_ends_with_its_worker(registry: WorkerRegistry, beat: Callable[..., None]) -> None:
    beat("a", "b")
    fail(registry, "a")
    registry.deregister("a")
    beat("a")
    assert set(chosen(registry)) == {"a", "b"}


def test_leases_of_a_failed_release_are_given_back(registry: WorkerRegistry, beat: Callable[..., None]) -> None:
    beat("a")
    registry.acquire("m", "1")
    registry.acquire("m", "2")
    registry.release([], failed=["1", "never given"], unused=["2"])
    assert [row.in_flight for row in registry.table().workers] == [0]
