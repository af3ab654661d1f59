from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.control import dispatch
from fastserve.control.dispatch import Candidate
from fastserve.control.dispatch.lottery import choose as lottery
from fastserve.control.dispatch.shortest_queue import choose as shortest_queue
from fastserve.errors import StartupError

CANDIDATES = st.lists(
    st.builds(Candidate, address=st.text(), speed=st.floats(0, 100), in_flight=st.integers(0, 1000)), min_size=1
)


def test_the_files_are_the_methods() -> None:
    assert dispatch.names() == ["lottery", "shortest_queue"]


def test_listing_imports_none_of_them() -> None:
    code = (
        "import sys; from fastserve.control import dispatch; dispatch.names();"
        "print([m for m in sys.modules if m.startswith('fastserve.control.dispatch.')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(StartupError, match=r"round_robin.*lottery, shortest_queue"):
        dispatch.load("round_robin")


@pytest.mark.parametrize("name", dispatch.names())
@given(candidates=CANDIDATES, seed=st.integers())
def test_every_method_keeps_the_contract(name: str, candidates: list[Candidate], seed: int) -> None:
    choose = dispatch.load(name)
    index = choose(candidates, random.Random(seed))
    assert index is None or 0 <= index < len(candidates)
    assert choose(candidates, random.Random(seed)) == index


def test_lottery_draws_by_speed() -> None:
    rng = random.Random(0)
    candidates = [Candidate("slow", 1.0, 0), Candidate("fast", 3.0, 99)]
    drawn = Counter(lottery(candidates, rng) for _ in range(4000))
    assert 0.72 < drawn[1] / 4000 < 0.78


def test_lottery_without_speed_draws_nobody() -> None:
    assert lottery([Candidate("a", 4e-5, 0), Candidate("b", 4e-5, 0)], random.Random(0)) is None


def test_shortest_queue_weighs_requests_with_speed() -> None:
    assert (
        shortest_queue([Candidate("a", 1.0, 3), Candidate("b", 4.0, 8), Candidate("c", 1.0, 4)], random.Random(0)) == 1
    )


def test_shortest_queue_shares_ties() -> None:
    rng = random.Random(0)
    candidates = [Candidate("a", 1.0, 0), Candidate("b", 2.0, 0), Candidate("busy", 1.0, 1)]
    chosen = Counter(shortest_queue(candidates, rng) for _ in range(1000))
    assert set(chosen) == {0, 1}
    assert min(chosen.values()) > 400


def test_shortest_queue_leaves_a_worker_without_speed_for_last() -> None:
    assert shortest_queue([Candidate("dead", 0.0, 0), Candidate("b", 1.0, 50)], random.Random(0)) == 1
