from __future__ import annotations

from fastserve.gateway.outliers import AVOID_S, MAX_AVOIDED, MAX_WORKERS, OVERRULED_LIMIT, OutlierDetector


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_a_worker_is_proven_by_its_last_answer_only() -> None:
    outliers = OutlierDetector(Clock())
    assert not outliers.is_proven("a")
    outliers.note_success("a")
    assert outliers.is_proven("a")
    outliers.note_refusal("a")
    assert not outliers.is_proven("a")


def test_a_worker_overruled_in_a_row_is_avoided_for_a_while() -> None:
    clock = Clock()
    outliers = OutlierDetector(clock)
    for _ in range(OVERRULED_LIMIT - 1):
        outliers.note_overruled("a")
    assert outliers.avoided() == []
    outliers.note_overruled("a")
    assert outliers.avoided() == ["a"]
    clock.now += AVOID_S
    assert outliers.avoided() == []
    outliers.note_overruled("a")  # once more, and it is avoided again
    assert outliers.avoided() == ["a"]


def test_a_success_clears_the_record() -> None:
    outliers = OutlierDetector(Clock())
    for _ in range(OVERRULED_LIMIT):
        outliers.note_overruled("a")
    outliers.note_success("a")
    assert outliers.avoided() == []
    for _ in range(OVERRULED_LIMIT - 1):
        outliers.note_overruled("a")
    assert outliers.avoided() == []


def test_many_workers_are_forgotten_in_turn() -> None:
    outliers = OutlierDetector(Clock())
    for number in range(MAX_WORKERS + 10):
        outliers.note_success(f"w{number}")
        for _ in range(OVERRULED_LIMIT):
            outliers.note_overruled(f"w{number}")
    assert not outliers.is_proven("w0")
    assert outliers.is_proven(f"w{MAX_WORKERS + 9}")
    assert len(outliers.avoided()) == MAX_AVOIDED
