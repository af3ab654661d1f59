"""What a step costs by its number of tokens, and from it one figure that can be compared between workers.

Tokens per second under load says as much about the load as about the worker: a full batch makes more of them. So the
engine measures at start what steps of few and of many tokens take, and corrects this curve by the steps that follow.
The figure is the decode speed of a reference batch on the curve; speculation reads from the curve what drafts cost.
"""

from __future__ import annotations

REFERENCE_BATCH = 8
_SMOOTHING = 0.05
"""Of all sizes together by one step: what slows one down, another load on the machine or longer contexts, slows all."""
_LOCAL_SMOOTHING = 0.1
"""Of the two sizes beside the step's."""
_MOST_DEVIATION = 2.0
"""Of one step: a stop of the process says nothing about the next steps."""
_NUM_SIZES = 13


class SpeedMeter:
    """`measured` are (tokens in the step, seconds) as found at start, before any request, two or more, fewest tokens
    first. The curve is kept at powers of two, straight between them, and never falls."""

    def __init__(self, *measured: tuple[int, float]) -> None:
        self._seconds = [max(1e-9, _on_line(1 << power, measured)) for power in range(_NUM_SIZES)]
        self._keep_rising(0, _NUM_SIZES - 1)

    def step_s(self, num_tokens: int) -> float:
        """Expected duration of a step of one token or more."""
        low, weight = _place(num_tokens)
        return self._seconds[low] + weight * (self._seconds[low + 1] - self._seconds[low])

    def record(self, num_tokens: int, seconds: float) -> None:
        """Take in one step. Much larger ones than what was measured tell about their own size only."""
        ratio = min(max(seconds / self.step_s(num_tokens), 1 / _MOST_DEVIATION), _MOST_DEVIATION)
        low, weight = _place(num_tokens)
        if num_tokens <= 8 * REFERENCE_BATCH:
            self._seconds = [value * (1 + _SMOOTHING * (ratio - 1)) for value in self._seconds]
        inside = min(1.0, weight)
        self._seconds[low] *= 1 + _LOCAL_SMOOTHING * (1 - inside) * (ratio - 1)
        self._seconds[low + 1] *= 1 + _LOCAL_SMOOTHING * inside * (ratio - 1)
        self._keep_rising(low, low + 1)

    def _keep_rising(self, low: int, high: int) -> None:
        """`low` and `high` were set last: the others give way to them."""
        self._seconds[high] = max(self._seconds[high], self._seconds[low])
        for index in range(low - 1, -1, -1):
            self._seconds[index] = min(self._seconds[index], self._seconds[index + 1])
        for index in range(high + 1, _NUM_SIZES):
            self._seconds[index] = max(self._seconds[index], self._seconds[index - 1])

    @property
    def tokens_per_s(self) -> float:
        return REFERENCE_BATCH / self.step_s(REFERENCE_BATCH)


def _on_line(num_tokens: int, measured: tuple[tuple[int, float], ...]) -> float:
    """On the line through the two measured sizes next to it."""
    right = next((index for index, (size, _) in enumerate(measured) if size > num_tokens), len(measured) - 1)
    right = max(1, right)
    (low, low_s), (high, high_s) = measured[right - 1], measured[right]
    return low_s + (num_tokens - low) * max(0.0, (high_s - low_s) / (high - low))


def _place(num_tokens: int) -> tuple[int, float]:
    """Index of the size at or under it, and how far it lies on the way to the next (beyond the last: over 1)."""
    low = min(num_tokens.bit_length() - 1, _NUM_SIZES - 2)
    return low, (num_tokens - (1 << low)) / (1 << low)
