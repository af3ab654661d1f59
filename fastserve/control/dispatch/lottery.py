"""A draw among the workers, weighted by their speed. Needs no counts, so many controllers may do it side by side."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fastserve.control.dispatch import Candidate

MIN_TOTAL_SPEED = 1e-4


def choose(candidates: Sequence[Candidate], rng: random.Random) -> int | None:
    """None when the speeds add up to nearly nothing."""
    speeds = [candidate.speed for candidate in candidates]
    if sum(speeds) < MIN_TOTAL_SPEED:
        return None
    return rng.choices(range(len(candidates)), weights=speeds)[0]
