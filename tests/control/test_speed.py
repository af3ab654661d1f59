from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.control import speed
from fastserve.control.speed import RESCALE_S, SMALL_GROUP, WorkerSpeeds

Reported = tuple[tuple[str, ...], float | None, float]
"""Model names, tokens per second, claimed speed."""


def tracker_of(workers: Mapping[str, Reported], now: float = 0.0) -> WorkerSpeeds:
    tracker = WorkerSpeeds()
    for address, reported in workers.items():
        tracker.set(address, *reported, now)
    return tracker


def speeds(tracker: WorkerSpeeds) -> dict[str, float]:
    return {address: tracker.speed(address) for address in tracker._members}


def by_definition(workers: Mapping[str, Reported]) -> dict[str, float]:
    """The speeds of all workers, computed from the definition."""
    result = {address: claimed for address, (_, _, claimed) in workers.items()}
    groups: list[tuple[set[str], list[str]]] = []
    for address, (names, _, _) in workers.items():
        models, members, separate = set(names), [address], []
        for other_models, other_members in groups:
            if models.isdisjoint(other_models):
                separate.append((other_models, other_members))
            else:
                models |= other_models
                members += other_members
        groups = [*separate, (models, members)]
    for _, members in groups:
        measured = {address: rate for address in members if (rate := workers[address][1])}
        if measured:
            result |= {address: rate / fmean(measured.values()) for address, rate in measured.items()}
    return result


def test_measured_workers_are_compared_with_their_mean() -> None:
    tracker = tracker_of({"a": (("m",), 100.0, 1.0), "b": (("m",), 300.0, 1.0)})
    assert speeds(tracker) == {"a": pytest.approx(0.5), "b": pytest.approx(1.5)}


def test_a_fastchat_worker_counts_as_an_average_one() -> None:
    tracker = tracker_of({"a": (("m",), 100.0, 1.0), "b": (("m",), 300.0, 1.0), "f": (("m",), None, 1.0)})
    assert speeds(tracker)["f"] == 1.0


def test_one_kind_alone() -> None:
    assert speeds(tracker_of({"a": (("m",), 42.0, 1.0)})) == {"a": 1.0}
    assert speeds(tracker_of({"f": (("m",), None, 1.0), "g": (("m",), None, 2.0)})) == {"f": 1.0, "g": 2.0}
    assert speeds(tracker_of({"a": (("m",), 0.0, 1.0)})) == {"a": 1.0}
    assert speeds(tracker_of({"nameless": ((), 7.0, 1.0)})) == {"nameless": 1.0}


def test_workers_of_other_models_do_not_matter() -> None:
    assert speeds(tracker_of({"small": (("m",), 900.0, 1.0), "big": (("n",), 9.0, 1.0)})) == {"small": 1.0, "big": 1.0}


def test_sharing_any_model_keeps_the_proportion() -> None:
    workers: dict[str, Reported] = {
        "a": (("m",), 100.0, 1.0),
        "c": (("n",), 400.0, 1.0),
        "b": (("m", "n"), 200.0, 1.0),
    }
    tracker = tracker_of(workers)
    assert tracker.speed("b") / tracker.speed("a") == pytest.approx(2)
    assert tracker.speed("c") / tracker.speed("b") == pytest.approx(2)
    assert set(tracker.remove("b", 1.0)) == {"a", "c"}
    assert speeds(tracker) == {"a": 1.0, "c": 1.0}


NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f"])
MODELS = st.lists(st.sampled_from(["m", "n", "o", "p"]), max_size=3, unique=True).map(tuple)
RATES = st.one_of(st.none(), st.just(0.0), st.floats(0.5, 500))
STEPS = st.lists(st.tuples(NAMES, st.one_of(st.none(), st.tuples(MODELS, RATES, st.floats(0, 4)))), max_size=40)


@given(steps=STEPS)
def test_few_workers_always_have_the_speeds_of_the_definition(steps: list[tuple[str, Reported | None]]) -> None:
    tracker = WorkerSpeeds()
    workers: dict[str, Reported] = {}
    seen: dict[str, float] = {}
    for address, reported in steps:
        if reported is None:
            workers.pop(address, None)
            seen.pop(address, None)
            changed = tracker.remove(address, 0.0)
        else:
            workers[address] = reported
            changed = tracker.set(address, *reported, 0.0)
        seen |= {name: tracker.speed(name) for name in changed}
        assert speeds(tracker) == pytest.approx(by_definition(workers))
        assert seen == speeds(tracker), "a change of speed was not reported"


@given(steps=STEPS)
def test_many_workers_have_them_after_a_while(steps: list[tuple[str, Reported | None]]) -> None:
    tracker = WorkerSpeeds()
    workers: dict[str, Reported] = {f"w{n}": (("m",), None, 1.0) for n in range(SMALL_GROUP)}
    for address, first in workers.items():
        tracker.set(address, *first, 0.0)
    for address, reported in steps:
        if reported is None:
            workers.pop(address, None)
            tracker.remove(address, 0.0)
        else:
            workers[address] = reported
            tracker.set(address, *reported, 0.0)
    for step in range(4):  # a group that has split is rescaled part by part
        for address, last in workers.items():
            tracker.set(address, *last, 10.0 + step)
    assert speeds(tracker) == pytest.approx(by_definition(workers), rel=2 * speed.RESCALE_CHANGE)


def test_a_change_of_the_mean_reaches_many_workers_once_in_a_while() -> None:
    tracker = tracker_of({f"w{n}": (("m",), 100.0, 1.0) for n in range(1000)})
    changed = [len(list(tracker.set(f"w{n}", ("m",), 500.0 + n, 1.0, 5.0 + n * RESCALE_S / 100))) for n in range(100)]
    assert sorted(changed)[-2:] == [1, 1000]
    assert tracker.speed("w99") == pytest.approx(5.4, rel=0.1)
    tracker.set("w0", ("m",), 100.0, 1.0, 7.0)
    assert fmean(tracker.speed(f"w{n}") for n in range(1000)) == pytest.approx(1.0)
