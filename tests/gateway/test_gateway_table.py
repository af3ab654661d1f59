"""The cached routing table: changes, invalid rows, many workers. No sockets."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from typing import Any

import pytest

from fastserve import dispatch
from fastserve.breaker import FAILURE_THRESHOLD, OPEN_S
from fastserve.errors import InvalidRequestError
from fastserve.gateway.table import MISSING_GRACE_S, CachedTable, parse_table
from fastserve.protocol import RoutingTable, WorkerEntry, WorkerStatus


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cached(clock: Clock) -> CachedTable:
    return CachedTable(clock, random.Random(0))


def row(address: str, in_flight: int = 0, models: Collection[str] = ("m",), **fields: Any) -> WorkerEntry:
    values = {"address": address, "status": {"model_names": list(models)}, "in_flight": in_flight, "speed": 1.0}
    return WorkerEntry.model_validate(values | fields)


def whole(*rows: WorkerEntry, epoch: str = "e", version: int = 1) -> RoutingTable:
    return RoutingTable(dispatch_method="shortest_queue", workers=list(rows), epoch=epoch, version=version)


def changes(*rows: WorkerEntry, removed: Collection[str] = (), version: int = 2) -> RoutingTable:
    return whole(*rows, version=version).model_copy(update={"is_delta": True, "removed": list(removed)})


# ---- changes ----------------------------------------------------------------------------------------------------


def test_changes_replace_rows_and_leave_the_others(cached: CachedTable) -> None:
    cached.update(whole(row("a", 1), row("b", 2)), {})
    cached.update(changes(row("a", 9), row("c", 5, ["n"])), {})
    assert (cached.epoch, cached.version) == ("e", 2)
    assert cached.choose("m", "chat", [], {}) == "b"
    assert cached.choose("m", "chat", ["b"], {}) == "a"
    assert cached.model_names() == ["m", "n"]


def test_a_removed_worker_is_no_longer_listed_and_comes_last_for_a_while(cached: CachedTable, clock: Clock) -> None:
    cached.update(whole(row("a"), row("b", 9), row("c", 9, ["n"])), {})
    cached.update(changes(removed=["a", "c", "never there"]), {})
    assert [cached.is_listed(address) for address in "abc"] == [False, True, False]
    assert cached.model_names() == ["m"]
    assert cached.choose("m", "chat", [], {}) == "b"
    assert cached.choose("m", "chat", ["b"], {}) == "a"
    clock.now += MISSING_GRACE_S
    cached.update(changes(version=3), {})
    assert cached.choose("m", "chat", ["b"], {}) == ""


def test_a_removed_worker_comes_back(cached: CachedTable, clock: Clock) -> None:
    cached.update(whole(row("a")), {})
    cached.update(changes(removed=["a"]), {})
    clock.now += MISSING_GRACE_S / 2
    cached.update(changes(row("a"), version=3), {})
    clock.now += MISSING_GRACE_S
    cached.update(changes(version=3), {})
    assert cached.is_listed("a")
    assert cached.model_names() == ["m"]


def test_a_worker_that_changes_its_models_is_found_under_the_new_ones(cached: CachedTable) -> None:
    cached.update(whole(row("a")), {})
    assert cached.choose("m", "chat", [], {}) == "a"
    cached.update(changes(row("a", models=["n"])), {})
    assert (cached.choose("m", "chat", [], {}), cached.choose("n", "chat", [], {})) == ("", "a")


def test_the_empty_table_of_a_restarted_controller_takes_nobody_away_at_once(cached: CachedTable) -> None:
    cached.update(whole(row("a")), {})
    cached.update(whole(epoch="f", version=0), {})
    assert cached.choose("m", "chat", [], {}) == "a"
    assert cached.model_names() == ["m"]
    assert not cached.is_listed("a")


def test_a_paused_worker_is_chosen_only_when_no_other_can_be(cached: CachedTable) -> None:
    paused: dict[str, Any] = {"status": {"model_names": ["m"], "capabilities": ["chat", "embeddings"], "paused": True}}
    cached.update(whole(row("a", **paused), row("b", 9)), {})
    assert cached.choose("m", "chat", [], {}) == "b"
    assert cached.choose("m", "chat", ["b"], {}) == "a"
    assert cached.choose("m", "embeddings", [], {}) == "a"
    cached.suspect("b")
    assert cached.choose("m", "chat", [], {}) == "a", "a pause is no failure"
    cached.update(changes(row("a")), {})
    assert cached.choose("m", "chat", [], {}) == "a", "resumed"


def test_paused_workers_among_many_get_nothing(cached: CachedTable) -> None:
    paused = [row(f"p{n}", status={"model_names": ["m"], "paused": True}) for n in range(100)]
    cached.update(whole(*paused, row("a", 50)), {})
    assert {cached.choose("m", "chat", [], {}) for _ in range(20)} == {"a"}


# ---- failures while the controller is away ----------------------------------------------------------------------


def test_a_worker_that_fails_request_after_request_comes_last(cached: CachedTable, clock: Clock) -> None:
    cached.update(whole(row("a"), row("b", 9)), {})
    for _ in range(FAILURE_THRESHOLD):
        assert cached.choose("m", "chat", [], {}) == "a"
        cached.record("a", failed=True)
    assert cached.choose("m", "chat", [], {}) == "b"
    assert cached.choose("m", "chat", ["b"], {}) == "a", "a failing worker is better than none"
    clock.now += OPEN_S
    assert [cached.choose("m", "chat", [], {}) for _ in range(3)] == ["a", "b", "b"], "one request probes it"
    cached.record("a", failed=False)
    assert cached.choose("m", "chat", [], {}) == "a"


def test_the_controllers_word_of_an_open_breaker_counts(cached: CachedTable) -> None:
    cached.update(whole(row("a", breaker="open"), row("b", 9)), {})
    assert cached.choose("m", "chat", [], {}) == "b"


# ---- the controller's dispatch method ------------------------------------------------------------------------------


def by_method(method: str, *rows: WorkerEntry) -> RoutingTable:
    return whole(*rows).model_copy(update={"dispatch_method": method})


def test_lottery_is_kept_up_while_the_controller_is_away(cached: CachedTable) -> None:
    cached.update(by_method("lottery", row("slow", 0, speed=0.5), row("fast", 50, speed=1.5)), {})
    chosen = [cached.choose("m", "chat", [], {"fast": 50}) for _ in range(2000)]
    assert 1400 < chosen.count("fast") < 1600, "by speed alone, however long the queue"
    cached.record("fast", failed=True)
    cached.suspect("fast")
    assert {cached.choose("m", "chat", [], {}) for _ in range(50)} == {"slow"}
    assert {cached.choose("m", "chat", ["slow"], {}) for _ in range(50)} == {"fast"}
    cached.update(by_method("shortest_queue", row("slow", 0, speed=0.5), row("fast", 50, speed=1.5)), {})
    assert cached.choose("m", "chat", [], {}) == "slow"


@pytest.mark.parametrize("method", dispatch.names())
def test_each_method_chooses_among_many_workers_and_leaves_out_the_excluded_ones(
    cached: CachedTable, method: str
) -> None:
    cached.update(by_method(method, *(row(f"w{n}") for n in range(500))), {})
    excluded = {f"w{n}" for n in range(0, 500, 2)}
    assert {int(cached.choose("m", "chat", excluded, {})[1:]) % 2 for _ in range(100)} == {1}
    assert cached.choose("m", "chat", {f"w{n}" for n in range(500)}, {}) == ""


def test_a_method_of_a_newer_controller_is_replaced_by_the_shortest_queue_and_named_once(
    cached: CachedTable, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        cached.update(by_method("tea\nleaves", row("a", 9), row("b", 1)), {})
        assert cached.choose("m", "chat", [], {}) == "b"
    (record,) = caplog.records
    assert "tea\\nleaves" in record.getMessage()


def test_a_worker_without_speed_comes_last_but_is_better_than_none(cached: CachedTable) -> None:
    cached.update(whole(row("a", 0, speed=0.0), row("b", 9)), {})
    assert cached.choose("m", "chat", [], {}) == "b"
    assert cached.choose("m", "chat", ["b"], {}) == "a"


# ---- many workers -----------------------------------------------------------------------------------------------


def test_among_many_workers_a_choice_is_a_good_one_and_never_an_excluded_one(cached: CachedTable) -> None:
    cached.update(whole(*(row(f"w{n}", n % 10) for n in range(1000))), {})
    excluded = [f"w{n}" for n in range(1000) if n % 10 == 0]
    for _ in range(50):
        chosen = cached.choose("m", "chat", excluded, {})
        assert int(chosen[1:]) % 10 in (1, 2, 3)


def test_the_one_healthy_worker_of_many_is_found(cached: CachedTable) -> None:
    cached.update(whole(*(row(f"w{n}", breaker="closed" if n == 777 else "open") for n in range(1000))), {})
    assert {cached.choose("m", "chat", [], {}) for _ in range(20)} == {"w777"}


# ---- bad rows ---------------------------------------------------------------------------------------------------

GOOD = {"address": "http://a:1", "status": {"model_names": ["m"]}, "in_flight": 1, "speed": 1.0}


def table_json(*rows: object, **fields: object) -> bytes:
    return json.dumps({"dispatch_method": "lottery", "workers": rows} | fields).encode()


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (GOOD | {"speed": float("nan")}, "speed"),
        (GOOD | {"speed": float("inf")}, "speed"),
        (GOOD | {"in_flight": -1}, "in_flight"),
        (GOOD | {"in_flight": True}, "in_flight"),
        (GOOD | {"address": "http://a:1\r\nforged"}, "address"),
        (GOOD | {"address": "a" * 301}, "address"),
        (GOOD | {"breaker": "ajar"}, "breaker"),
        (GOOD | {"status": {"model_names": ["m"], "kv_usage": 10**400}}, "status.kv_usage"),
        (GOOD | {"status": {"model_names": ["m"] * 257}}, "status.model_names"),
        ({"address": "http://a:1"}, "status"),
        ("row", "body"),
        (None, "body"),
        ([[]], "body"),
    ],
)
def test_a_bad_row_is_left_out_and_named_and_the_others_stay(bad: object, field: str) -> None:
    table, problems = parse_table(table_json(GOOD, bad, GOOD | {"address": "http://b:1"}, epoch="e", version=7))
    assert [entry.address for entry in table.workers] == ["http://a:1", "http://b:1"]
    assert (table.epoch, table.version) == ("e", 7)
    (problem,) = problems
    assert f"'{field}'" in problem
    assert problem.isprintable()
    assert len(problem) < 300


def test_an_invalid_row_of_a_change_keeps_the_last_one(cached: CachedTable) -> None:
    cached.update(whole(row("http://a:1")), {})
    table, problems = parse_table(table_json(GOOD | {"speed": "fast"}, epoch="e", version=2, is_delta=True))
    cached.update(table, {})
    assert len(problems) == 1
    assert cached.choose("m", "chat", [], {}) == "http://a:1"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"nonsense",
        b"{}",
        b"null",
        b"\xff",
        b'{"workers": 1}',
        b'{"dispatch_method": "x", "workers": {}}',
        table_json(GOOD, version=-1),
        table_json(GOOD, removed=[1]),
    ],
)
def test_an_invalid_table_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_table(content)


def test_a_controller_of_the_version_before_is_understood() -> None:
    table, problems = parse_table(table_json(GOOD))
    assert (len(table.workers), problems, table.is_delta, table.epoch) == (1, [], False, "")
    assert WorkerStatus(model_names=["m"]) == table.workers[0].status
