from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.control.clock import MAX_GAP_S, RunningClock


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_without_ticks_it_is_the_plain_clock() -> None:
    plain = Clock()
    clock = RunningClock(plain)
    plain.now += 1000
    assert clock() == 1050.0


def test_time_goes_on_while_the_process_runs_and_hardly_while_it_is_held_up() -> None:
    plain = Clock()
    clock = RunningClock(plain)
    clock.tick()
    for _ in range(40):
        plain.now += 0.25
        clock.tick()
    assert clock() == 60.0
    plain.now += 300
    assert clock() == pytest.approx(60.0 + MAX_GAP_S)
    clock.tick()
    plain.now += 0.2
    assert clock() == pytest.approx(60.0 + MAX_GAP_S + 0.2)


@given(steps=st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=50))
def test_it_never_goes_back_and_never_faster_than_the_plain_clock(steps: list[tuple[float, bool]]) -> None:
    plain = Clock()
    clock = RunningClock(plain)
    clock.tick()
    before = clock()
    for seconds, ticks in steps:
        plain.now += seconds
        if ticks:
            clock.tick()
        after = clock()
        assert -1e-9 <= after - before <= seconds + 1e-9
        before = after
