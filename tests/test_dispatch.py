from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve import dispatch
from fastserve.dispatch import DispatchIndex
from fastserve.dispatch.lottery import MIN_TOTAL_SPEED
from fastserve.dispatch.lottery import Index as Lottery
from fastserve.dispatch.shortest_queue import Index as ShortestQueue
from fastserve.errors import StartupError

ADDRESSES = st.sampled_from([f"w{n}" for n in range(12)])
SPEEDS = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(0, 100))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), ADDRESSES, SPEEDS, st.integers(0, 6)),
        st.tuples(st.just("remove"), ADDRESSES, st.just(0.0), st.just(0)),
    ),
    max_size=60,
)
Workers = Mapping[str, tuple[float, int]]


def filled(index: DispatchIndex, **workers: tuple[float, int]) -> DispatchIndex:
    for address, (speed, in_flight) in workers.items():
        index.set(address, speed, in_flight)
    return index


def with_shortest_queue(workers: Workers, exclude: Collection[str]) -> set[str]:
    """The workers with the shortest queue, by a linear scan."""
    waits = {a: n / speed if speed > 0 else math.inf for a, (speed, n) in workers.items() if a not in exclude}
    return {address for address, wait in waits.items() if wait == min(waits.values())}


def with_speed(workers: Workers, exclude: Collection[str]) -> set[str]:
    speeds = {address: speed for address, (speed, _) in workers.items() if address not in exclude}
    return {a for a, speed in speeds.items() if speed > 1e-6} if sum(speeds.values()) > 2 * MIN_TOTAL_SPEED else set()


def test_the_files_are_the_methods() -> None:
    assert dispatch.names() == ["lottery", "shortest_queue"]


def test_listing_imports_none_of_them() -> None:
    code = (
        "import sys; from fastserve import dispatch; dispatch.names();"
        "print([m for m in sys.modules if m.startswith('fastserve.dispatch.')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(StartupError, match=r"round_robin.*lottery, shortest_queue"):
        dispatch.load("round_robin")


@pytest.mark.parametrize("name", dispatch.names())
@given(steps=STEPS, exclude=st.sets(ADDRESSES, max_size=6), seed=st.integers())
def test_every_method_keeps_the_contract(
    name: str, steps: list[tuple[str, str, float, int]], exclude: set[str], seed: int
) -> None:
    index = dispatch.load(name)()
    present = set()
    for step, address, speed, in_flight in steps:
        if step == "set":
            index.set(address, speed, in_flight)
            present.add(address)
        else:
            index.remove(address)
            present.discard(address)
    chosen = index.choose(exclude, random.Random(seed))
    assert chosen is None or chosen in present - exclude
    assert index.choose(exclude, random.Random(seed)) == chosen


@pytest.mark.parametrize(("make", "expected"), [(ShortestQueue, with_shortest_queue), (Lottery, with_speed)])
@given(steps=STEPS, exclude=st.sets(ADDRESSES, max_size=6), seed=st.integers())
def test_a_choice_is_one_that_a_walk_over_all_workers_could_make(
    make: type[DispatchIndex], expected: object, steps: list[tuple[str, str, float, int]], exclude: set[str], seed: int
) -> None:
    index = make()
    workers: dict[str, tuple[float, int]] = {}
    rng = random.Random(seed)
    for step, address, speed, in_flight in steps:
        if step == "set":
            index.set(address, speed, in_flight)
            workers[address] = speed, in_flight
        else:
            index.remove(address)
            workers.pop(address, None)
        index.choose(exclude, rng)  # must not change the index
    allowed = expected(workers, exclude)  # type: ignore[operator]
    chosen = {index.choose(exclude, rng) for _ in range(20)} - {None}
    assert chosen <= allowed or make is Lottery
    assert bool(chosen) == bool(allowed) or (make is Lottery and not allowed)


@given(speeds=st.lists(st.floats(0, 50), min_size=1, max_size=40), gone=st.sets(st.integers(0, 39)))
def test_the_lottery_gives_each_worker_its_share(speeds: list[float], gone: set[int]) -> None:
    """Every ticket belongs to a worker, and each worker has as many tickets as its weight."""
    index = Lottery()
    for n, speed in enumerate(speeds):
        index.set(str(n), speed, 0)
    for n in gone:
        index.remove(str(n))
    end = 0
    for slot, weight in enumerate(index._weights):
        if weight:
            assert index._find(end) == slot
            assert index._find(end + weight - 1) == slot
        end += weight
    assert end == index._total


def test_lottery_draws_by_speed() -> None:
    rng = random.Random(0)
    index = filled(Lottery(), slow=(1.0, 0), fast=(3.0, 99))
    sampled = Counter(index.choose((), rng) for _ in range(4000))
    assert 0.72 < sampled["fast"] / 4000 < 0.78
    assert {index.choose(["fast"], rng) for _ in range(20)} == {"slow"}


def test_lottery_without_speed_draws_nobody() -> None:
    assert filled(Lottery(), a=(4e-5, 0), b=(4e-5, 0)).choose((), random.Random(0)) is None


def test_shortest_queue_weighs_requests_with_speed() -> None:
    index = filled(ShortestQueue(), a=(1.0, 3), b=(4.0, 8), c=(1.0, 4))
    assert index.choose((), random.Random(0)) == "b"
    assert index.choose(["b"], random.Random(0)) == "a"


def test_shortest_queue_shares_ties() -> None:
    rng = random.Random(0)
    index = filled(ShortestQueue(), a=(1.0, 0), b=(2.0, 0), busy=(1.0, 1))
    chosen = Counter(index.choose((), rng) for _ in range(1000))
    assert set(chosen) == {"a", "b"}
    assert min(chosen.values()) > 400


def test_shortest_queue_leaves_a_worker_without_speed_for_last() -> None:
    index = filled(ShortestQueue(), dead=(0.0, 0), b=(1.0, 50))
    assert index.choose((), random.Random(0)) == "b"
    assert index.choose(["b"], random.Random(0)) == "dead"


def test_an_index_does_not_grow_with_the_number_of_updates() -> None:
    queue, lottery = ShortestQueue(), Lottery()
    rng = random.Random(0)
    for n in range(20_000):
        for index in (queue, lottery):
            index.set(f"w{n % 50}", 1.0 + rng.random(), 1 + n % 7)
            index.remove(f"w{n * 7 % 50}")
    assert len(queue._heap) <= 200
    assert len(lottery._tree) <= 51


@pytest.mark.parametrize("name", dispatch.names())
def test_the_cost_of_a_choice_hardly_grows_with_the_workers(name: str) -> None:
    """Measured in Python calls and lines, which do not depend on the load of the machine."""

    def steps(num_workers: int) -> int:
        index = dispatch.load(name)()
        rng = random.Random(0)
        for n in range(num_workers):
            index.set(str(n), 1.0 + n % 5, n % 3)
        count = 0

        def trace(*_: object) -> object:
            nonlocal count
            count += 1
            return trace

        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            for _ in range(100):
                chosen = index.choose(("1", "2"), rng)
                assert chosen is not None
                index.set(chosen, 1.0, 5)
        finally:
            sys.settrace(None)
        return count

    assert steps(8192) < 4 * steps(32)
