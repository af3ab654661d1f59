"""Duration of a step as a function of its number of tokens, and a speed that can be compared between workers.

Tokens per second under load depend on the load as much as on the worker: a full batch gives more of them. So the engine
measures at start how long steps of few and of many tokens take, and updates this curve with each step. The speed is the
decode speed of a reference batch on the curve; speculation takes the cost of drafts from it.
"""

from __future__ import annotations

REFERENCE_BATCH = 8
_SMOOTHING = 0.05
"""Weight of one step for all sizes: other load on the machine or longer contexts slow all of them down."""
_LOCAL_SMOOTHING = 0.1
"""Weight of one step for the two sizes next to its own."""
_MAX_DEVIATION = 2.0
"""Limit of a step's ratio to the curve: a stall of the process does not predict the next steps."""
_NUM_SIZES = 13


class SpeedMeter:
    """`measured`: two or more pairs (tokens in the step, seconds), measured before any request, fewest tokens first.
    The curve is stored at powers of two, linear between them, and never falls."""

    def __init__(self, *measured: tuple[int, float]) -> None:
        self._seconds = [max(1e-9, _interpolate(1 << power, measured)) for power in range(_NUM_SIZES)]
        self._keep_rising(0, _NUM_SIZES - 1)

    def step_s(self, num_tokens: int) -> float:
        """Expected duration of a step of one token or more."""
        low, weight = _locate(num_tokens)
        return self._seconds[low] + weight * (self._seconds[low + 1] - self._seconds[low])

    def record(self, num_tokens: int, seconds: float) -> None:
        """Update the curve with one step. Steps much larger than the measured ones change their own size only."""
        ratio = min(max(seconds / self.step_s(num_tokens), 1 / _MAX_DEVIATION), _MAX_DEVIATION)
        low, weight = _locate(num_tokens)
        if num_tokens <= 8 * REFERENCE_BATCH:
            self._seconds = [value * (1 + _SMOOTHING * (ratio - 1)) for value in self._seconds]
        inside = min(1.0, weight)
        self._seconds[low] *= 1 + _LOCAL_SMOOTHING * (1 - inside) * (ratio - 1)
        self._seconds[low + 1] *= 1 + _LOCAL_SMOOTHING * inside * (ratio - 1)
        self._keep_rising(low, low + 1)

    def _keep_rising(self, low: int, high: int) -> None:
        """Make the curve rise, changing the other sizes, not `low` and `high`, which were just set."""
        self._seconds[high] = max(self._seconds[high], self._seconds[low])
        for index in range(low - 1, -1, -1):
            self._seconds[index] = min(self._seconds[index], self._seconds[index + 1])
        for index in range(high + 1, _NUM_SIZES):
            self._seconds[index] = max(self._seconds[index], self._seconds[index - 1])

    @property
    def tokens_per_s(self) -> float:
        return REFERENCE_BATCH / self.step_s(REFERENCE_BATCH)


def _interpolate(num_tokens: int, measured: tuple[tuple[int, float], ...]) -> float:
    """Seconds on the line through the two measured sizes nearest to `num_tokens`."""
    right = next((index for index, (size, _) in enumerate(measured) if size > num_tokens), len(measured) - 1)
    right = max(1, right)
    (low, low_s), (high, high_s) = measured[right - 1], measured[right]
    return low_s + (num_tokens - low) * max(0.0, (high_s - low_s) / (high - low))


def _locate(num_tokens: int) -> tuple[int, float]:
    """Index of the largest size up to `num_tokens`, and the fraction of the way to the next (over 1 after the last)."""
    low = min(num_tokens.bit_length() - 1, _NUM_SIZES - 2)
    return low, (num_tokens - (1 << low)) / (1 << low)
