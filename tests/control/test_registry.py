from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import pytest

from fastserve import dispatch
from fastserve.control.registry import WorkerRegistry
from fastserve.protocol import MAX_REQUESTS, WorkerEntry, WorkerStatus


class Clock(Protocol):
    now: float


MakeStatus = Callable[..., WorkerStatus]
FASTCHAT = WorkerStatus(model_names=["m"], speed=1, queue_length=0)


def in_flight(registry: WorkerRegistry) -> dict[str, int]:
    return {worker.address: worker.in_flight for worker in registry.table().workers}


# ---- coming and going -------------------------------------------------------------------------------------------


def test_a_heartbeat_with_status_registers(registry: WorkerRegistry, status: MakeStatus) -> None:
    assert registry.heartbeat("w", 0, status())
    assert registry.acquire("m", "1").address == "w"


def test_a_fastchat_heartbeat_asks_an_unknown_worker_to_register(registry: WorkerRegistry) -> None:
    assert not registry.heartbeat("w", 0)
    registry.register("w", True, FASTCHAT)
    assert registry.heartbeat("w", 7)
    assert in_flight(registry) == {"w": 7}


def test_a_silent_worker_is_dropped_after_three_of_its_intervals(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock
) -> None:
    registry.heartbeat("w", 0, status())
    clock.now += 3.0
    assert registry.list_models() == ["m"]
    clock.now += 0.1
    assert registry.list_models() == []
    assert registry.table().workers == []
    assert registry.addresses() == []
    assert registry.acquire("m", "1").address == ""


def test_short_intervals_have_a_floor(registry: WorkerRegistry, status: MakeStatus, clock: Clock) -> None:
    registry.heartbeat("w", 0, status(heartbeat_interval_s=0.1))
    clock.now += 2.4
    assert registry.list_models() == ["m"]
    clock.now += 0.2
    assert registry.list_models() == []


def test_fastchat_workers_have_the_configured_time(make_registry: Callable[..., WorkerRegistry], clock: Clock) -> None:
    registry = make_registry(heartbeat_expiration_s=90.0)
    registry.register("w", True, FASTCHAT)
    clock.now += 89
    assert registry.heartbeat("w", 0)
    clock.now += 89
    assert registry.list_models() == ["m"]
    clock.now += 2
    assert not registry.heartbeat("w", 0)


def test_without_heartbeat_check_a_worker_stays(registry: WorkerRegistry, clock: Clock) -> None:
    registry.register("w", False, FASTCHAT)
    clock.now += 1e6
    assert registry.get_worker_address("m") == "w"


def test_a_worker_deregisters(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", 0, status())
    registry.acquire("m", "1")
    registry.deregister("w")
    registry.deregister("never there")
    assert registry.list_models() == []
    registry.register("w", True, FASTCHAT)
    assert in_flight(registry) == {"w": 0}


def test_a_failed_worker_is_out_at_once_and_back_with_its_next_heartbeat(
    registry: WorkerRegistry, status: MakeStatus
) -> None:
    registry.heartbeat("w", 0, status())
    registry.report_failure("w")
    answer = registry.acquire("m", "1")
    assert (answer.address, answer.known) == ("", True)
    assert registry.table().workers == []
    assert registry.list_models() == ["m"]
    registry.heartbeat("w", 0, status())
    assert registry.acquire("m", "1").address == "w"


def test_a_failed_worker_that_never_beats_is_tried_again_later(registry: WorkerRegistry, clock: Clock) -> None:
    registry.register("w", False, FASTCHAT)
    registry.report_failure("w")
    assert registry.get_worker_address("m") == ""
    clock.now += 5
    assert registry.get_worker_address("m") == "w"


def test_the_log_shows_which_workers_came_and_went_and_why(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    registry.heartbeat("w", 0, status(models=("m", "alias")))
    registry.report_failure("w")
    registry.heartbeat("w", 0, status(models=("m", "alias")))
    clock.now += 60
    registry.list_models()
    registry.heartbeat("w", 0, status(models=("m", "alias")))
    registry.deregister("w")
    assert [record.getMessage() for record in caplog.records] == [
        "Worker w is registered. Models: m, alias.",
        "Worker w is out of dispatch: a connection to it failed. Models: m, alias.",
        "Worker w is back. Models: m, alias.",
        "Worker w is dropped: it was silent for 60.0 s. Models: m, alias.",
        "Worker w is registered. Models: m, alias.",
        "Worker w is dropped: it said goodbye. Models: m, alias.",
    ]


def test_listing(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("a", 0, status(models=("z", "m")))
    registry.heartbeat("b", 0, status(models=("m", "eyes"), multimodal=True))
    assert registry.list_models() == ["eyes", "m", "z"]
    assert registry.list_models(multimodal=True) == ["eyes", "m"]
    assert registry.list_models(multimodal=False) == ["m", "z"]


# ---- choosing ---------------------------------------------------------------------------------------------------


def test_requests_spread_by_measured_speed(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("slow", 0, status(tokens_per_s=100.0))
    registry.heartbeat("fast", 0, status(tokens_per_s=300.0))
    taken = Counter(registry.acquire("m", str(n)).address for n in range(400))
    assert 290 <= taken["fast"] <= 310
    assert {w.address: w.speed for w in registry.table().workers} == {"slow": 0.5, "fast": 1.5}


def test_speed_is_compared_among_the_living(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("slow", 0, status(tokens_per_s=100.0))
    registry.heartbeat("fast", 0, status(tokens_per_s=300.0))
    registry.deregister("fast")
    assert [w.speed for w in registry.table().workers] == [1.0]


def test_excluded_workers_are_not_chosen(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("a", 0, status())
    registry.heartbeat("b", 0, status())
    assert {registry.acquire("m", str(n), ["a"]).address for n in range(20)} == {"b"}
    answer = registry.acquire("m", "last", ["a", "b"])
    assert (answer.address, answer.known) == ("", True)


def test_an_unknown_model_is_distinguished_from_a_busy_one(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("a", 0, status())
    answer = registry.acquire("n", "1")
    assert (answer.address, answer.known) == ("", False)
    assert registry.get_worker_address("n") == ""


def test_lottery_goes_by_speed_alone(make_registry: Callable[..., WorkerRegistry], status: MakeStatus) -> None:
    registry = make_registry("lottery")
    registry.heartbeat("a", 0, status(others=500))
    assert registry.get_worker_address("m") == "a"
    registry.heartbeat("a", 0, status(speed=0.0))
    assert registry.get_worker_address("m") == ""


@pytest.mark.parametrize("method", dispatch.names())
def test_a_paused_worker_is_chosen_only_when_no_other_can_be(
    make_registry: Callable[..., WorkerRegistry], status: MakeStatus, method: str
) -> None:
    registry = make_registry(method)
    registry.heartbeat("paused", 0, status(paused=True, capabilities=["chat", "embeddings"]))
    registry.heartbeat("busy", 9, status(others=9, capabilities=["chat"]))
    registry.heartbeat("other model", 0, status(models=("n",), capabilities=["chat", "embeddings"]))
    assert {registry.acquire("m", f"chat {n}", (), "chat").address for n in range(30)} == {"busy"}
    assert {registry.get_worker_address("m") for _ in range(10)} == {"busy"}, "whatever the capability"
    assert registry.acquire("m", "embedding", (), "embeddings").address == "paused"
    assert registry.acquire("m", "retry", ["busy"], "chat").address == "paused"
    registry.report_failure("busy")
    assert registry.acquire("m", "alone", (), "chat").address == "paused"


def test_a_worker_that_resumes_is_preferred_again(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("a", 0, status(paused=True))
    registry.heartbeat("b", 5, status(others=5))
    before = registry.table()
    assert registry.acquire("m", "1").address == "b"
    registry.heartbeat("a", 0, status())
    assert b'"address":"a"' in registry.table_json(before.epoch, before.version), "its row counts as changed"
    assert registry.acquire("m", "2").address == "a"
    registry.heartbeat("a", 1, status("2", paused=True))
    registry.heartbeat("b", 5, status("1", others=5, paused=True))
    assert registry.acquire("m", "3").address == "a", "among paused workers the method chooses"
    registry.deregister("a")
    registry.deregister("b")
    assert registry.acquire("m", "4").address == ""


# ---- counting ---------------------------------------------------------------------------------------------------


def test_acquire_and_release_count_exactly(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("a", 0, status())
    registry.heartbeat("b", 0, status())
    for n in range(10):
        registry.acquire("m", str(n))
    assert in_flight(registry) == {"a": 5, "b": 5}
    registry.release([str(n) for n in range(10)])
    registry.release(["0", "never given"])
    assert in_flight(registry) == {"a": 0, "b": 0}


def test_fastchats_dispatches_count_until_the_next_heartbeat(registry: WorkerRegistry) -> None:
    registry.register("w", True, FASTCHAT)
    registry.get_worker_address("m")
    registry.get_worker_address("m")
    assert in_flight(registry) == {"w": 2}
    registry.heartbeat("w", 1)
    assert in_flight(registry) == {"w": 1}


def test_traffic_past_the_controller_counts(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", 0, status())
    registry.acquire("m", "1")
    registry.heartbeat("w", 4, status("1", others=3))
    assert in_flight(registry) == {"w": 4}


def test_a_restarted_controller_takes_up_the_leases(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", 2, status("old1", "old2"))
    assert in_flight(registry) == {"w": 2}
    registry.release(["old1"])
    assert in_flight(registry) == {"w": 1}
    registry.heartbeat("w", 0, status())
    assert in_flight(registry) == {"w": 0}


def test_a_fresh_lease_survives_a_heartbeat_that_does_not_know_it_yet(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock
) -> None:
    registry.heartbeat("w", 0, status())
    registry.acquire("m", "1")
    clock.now += 1.9
    registry.heartbeat("w", 0, status())
    assert in_flight(registry) == {"w": 1}
    clock.now += 0.1
    registry.heartbeat("w", 0, status())
    assert in_flight(registry) == {"w": 0}


def test_the_grace_follows_the_workers_interval(registry: WorkerRegistry, status: MakeStatus, clock: Clock) -> None:
    registry.heartbeat("w", 0, status(heartbeat_interval_s=10.0))
    registry.acquire("m", "1")
    clock.now += 19
    registry.heartbeat("w", 0, status(heartbeat_interval_s=10.0))
    assert in_flight(registry) == {"w": 1}
    clock.now += 1
    registry.heartbeat("w", 0, status(heartbeat_interval_s=10.0))
    assert in_flight(registry) == {"w": 0}


def test_a_lease_ends_when_the_worker_no_longer_lists_it(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", 0, status())
    registry.acquire("m", "1")
    registry.heartbeat("w", 1, status("1"))
    registry.heartbeat("w", 0, status())
    assert in_flight(registry) == {"w": 0}


def test_a_released_lease_in_a_late_heartbeat_stays_ended(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock
) -> None:
    registry.heartbeat("w", 0, status())
    registry.acquire("m", "1")
    registry.release(["1"])
    registry.heartbeat("w", 1, status("1"))
    assert in_flight(registry) == {"w": 0}
    clock.now += 6  # listed long after the release: it really runs there
    registry.heartbeat("w", 1, status("1"))
    assert in_flight(registry) == {"w": 1}


def test_a_release_that_comes_before_the_controller_knew_the_lease(
    registry: WorkerRegistry, status: MakeStatus
) -> None:
    registry.release(["1"])
    registry.heartbeat("w", 1, status("1"))
    assert in_flight(registry) == {"w": 0}


def test_a_retried_request_counts_on_the_new_worker_only(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("a", 0, status())
    registry.heartbeat("b", 0, status())
    first = registry.acquire("m", "1").address
    second = registry.acquire("m", "1", [first]).address
    registry.heartbeat(first, 1, status("1"))  # sent before the request
    assert in_flight(registry) == {first: 0, second: 1}
    registry.release(["1"])
    assert in_flight(registry) == {"a": 0, "b": 0}


def test_a_restarted_worker_starts_from_zero(registry: WorkerRegistry, status: MakeStatus, clock: Clock) -> None:
    registry.heartbeat("w", 0, status())
    registry.acquire("m", "seen")
    registry.heartbeat("w", 1, status("seen"))
    registry.acquire("m", "on its way")
    registry.register("w", True, status())
    assert in_flight(registry) == {"w": 1}
    clock.now += 2
    registry.heartbeat("w", 0, status())
    assert in_flight(registry) == {"w": 0}


def test_leases_on_a_worker_that_lists_none(registry: WorkerRegistry, clock: Clock) -> None:
    registry.register("w", True, FASTCHAT)
    for lease in "123":
        registry.acquire("m", lease)
    registry.heartbeat("w", 3)
    assert in_flight(registry) == {"w": 3}
    clock.now += 45
    registry.heartbeat("w", 1)  # two have ended without a release
    assert in_flight(registry) == {"w": 1}
    registry.release(["1", "2"])  # the oldest were assumed to have ended
    assert in_flight(registry) == {"w": 1}
    registry.release(["3"])
    assert in_flight(registry) == {"w": 0}


def test_a_short_answer_to_a_poll_keeps_the_status_of_the_heartbeats(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock
) -> None:
    registry.heartbeat("w", 1, status("1", context_length=4096))
    registry.polled("w", WorkerStatus(model_names=["m"], queue_length=2))
    (worker,) = registry.table().workers
    assert worker.status.context_length == 4096
    assert worker.in_flight == 2
    registry.polled("gone meanwhile", FASTCHAT)
    clock.now += 3.1
    assert registry.addresses() == []


def test_a_poll_renews_a_fastchat_worker(registry: WorkerRegistry) -> None:
    registry.register("w", True, FASTCHAT)
    registry.report_failure("w")
    registry.polled("w", WorkerStatus(model_names=["renamed"], queue_length=2))
    assert registry.list_models() == ["renamed"]
    assert in_flight(registry) == {"w": 2}


def test_a_row_stays_within_the_bounds_of_its_readers(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", MAX_REQUESTS, status(queue_length=MAX_REQUESTS))
    for number in range(3):
        registry.acquire("m", f"lease{number}")
    (row,) = registry.table().workers
    assert WorkerEntry.model_validate_json(row.model_dump_json()).in_flight == MAX_REQUESTS


def test_leases_that_workers_list_are_kept_within_the_bound_of_all(
    make_registry: Callable[..., WorkerRegistry], status: MakeStatus
) -> None:
    registry = make_registry(max_leases=100)
    for number in range(20):
        leases = [f"{number}-{at}" for at in range(50)]
        registry.heartbeat(f"w{number}", 50, status(*leases))
    assert registry.figures().num_leases == 100
    assert set(in_flight(registry).values()) == {50}
    rows = registry.table().workers
    assert sum(len(row.status.leases) for row in rows) == 100
