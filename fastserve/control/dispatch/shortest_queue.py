"""The worker with the fewest requests for its speed; a draw among equals, so that idle workers share the work."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from fastserve.control.dispatch import Candidate


def choose(candidates: Sequence[Candidate], rng: random.Random) -> int | None:
    waits = [_wait(candidate) for candidate in candidates]
    shortest = min(waits)
    return rng.choice([index for index, wait in enumerate(waits) if wait == shortest])


def _wait(candidate: Candidate) -> float:
    return candidate.in_flight / candidate.speed if candidate.speed > 0 else math.inf
