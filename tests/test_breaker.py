"""The circuit breaker of a worker."""

from __future__ import annotations

import pytest

from fastserve.breaker import MAX_OPEN_S, PROBE_TIMEOUT_S, Breaker, fleet_allows


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker(threshold=3, open_s=10.0)
    assert [breaker.fail(at) for _ in range(3)] == [False, False, True]
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not_count_as_one() -> None:
    breaker = Breaker(threshold=3)
    for _ in range(4):
        breaker.fail(0.0)
        breaker.fail(0.0)
        breaker.succeed()
    assert breaker.state(0.0) == "closed"
    assert opened().state(0.0) == "open"


def test_one_probe_passes_when_the_pause_is_over() -> None:
    breaker = opened()
    assert not breaker.allows(9.9)
    assert breaker.next_probe_s(4.0) == pytest.approx(6.0)
    assert breaker.allows(10.0)
    breaker.start(10.0)
    assert not breaker.allows(10.1)
    breaker.succeed()
    assert breaker.state(10.2) == "closed"


def test_a_failed_probe_doubles_the_pause_up_to_the_maximum() -> None:
    breaker, now = opened(), 0.0
    for pause in (10.0, 20.0, MAX_OPEN_S, MAX_OPEN_S):
        assert not breaker.allows(now + pause - 0.1)
        now += pause
        breaker.start(now)
        assert breaker.fail(now)
    breaker.succeed()
    assert [breaker.fail(now) for _ in range(3)] == [False, False, True]
    assert breaker.allows(now + 10.0)


def test_a_probe_that_was_lost_is_followed_by_another() -> None:
    breaker = opened()
    breaker.start(10.0)
    assert not breaker.allows(10.0 + PROBE_TIMEOUT_S - 1)
    assert breaker.allows(10.0 + PROBE_TIMEOUT_S)


def test_never_more_than_half_of_a_fleet_is_out() -> None:
    for num_workers in range(1, 12):
        num_out = 0
        while fleet_allows(num_out, num_workers):
            num_out += 1
        assert num_out == num_workers // 2
