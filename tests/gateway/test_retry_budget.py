from __future__ import annotations

from fastserve.gateway.retry_budget import WINDOW_S, RetryBudget


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def spend_all(budget: RetryBudget) -> int:
    count = 0
    while budget.try_spend():
        count += 1
    return count


def test_the_floor_allows_retries_without_requests() -> None:
    clock = Clock()
    budget = RetryBudget(clock, percent=20.0, min_retries_per_s=2.0)
    assert spend_all(budget) == 2 * WINDOW_S
    assert not budget.try_spend()
    clock.now += WINDOW_S + 1
    assert spend_all(budget) == 2 * WINDOW_S


def test_requests_pay_for_their_share_of_retries() -> None:
    clock = Clock()
    budget = RetryBudget(clock, percent=20.0, min_retries_per_s=0.0)
    for _ in range(100):
        budget.note_request()
    assert spend_all(budget) in (19, 20)  # a sum of fractions may be just below an integer


def test_a_long_quiet_time_saves_nothing_up() -> None:
    clock = Clock()
    budget = RetryBudget(clock, percent=50.0, min_retries_per_s=0.0)
    for _ in range(100):
        budget.note_request()
    clock.now += WINDOW_S + 1
    assert spend_all(budget) == 0
    for _ in range(10):
        budget.note_request()
    assert spend_all(budget) == 5


def test_retries_that_go_on_and_on_stay_within_the_share() -> None:
    """Every request tries to retry three times, for ten minutes."""
    clock = Clock()
    budget = RetryBudget(clock, percent=20.0, min_retries_per_s=1.0)
    num_requests = num_retries = 0
    for _ in range(6000):
        clock.now += 0.1
        for _ in range(5):
            budget.note_request()
            num_requests += 1
            num_retries += sum(budget.try_spend() for _ in range(3))
    # The minimum is per window, and one window may be used up just before the next begins.
    assert 0.19 * num_requests < num_retries < 0.2 * num_requests + 600 * 1.0 + 2 * WINDOW_S


def test_a_grant_is_for_once_and_for_now() -> None:
    clock = Clock()
    budget = RetryBudget(clock, percent=0.0, min_retries_per_s=0.0)
    budget.grant(7)
    assert spend_all(budget) == 7
    budget.grant(7)
    clock.now += WINDOW_S + 1
    assert spend_all(budget) == 0


def test_memory_does_not_grow_with_the_load() -> None:
    clock = Clock()
    budget = RetryBudget(clock, percent=20.0, min_retries_per_s=1.0)
    for _ in range(50_000):
        clock.now += 0.001
        budget.note_request()
    assert len(budget._slots) <= WINDOW_S + 1
