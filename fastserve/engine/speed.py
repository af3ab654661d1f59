"""How fast this engine is, as one number that can be compared between workers.

Tokens per second under load says as much about the load as about the worker: a full batch makes more of them. So the
engine measures at start what a step of few and of many tokens takes, and later only how much longer (or shorter) steps
take than that line foretells. The figure is the decode speed of a reference batch on that line.
"""

from __future__ import annotations

REFERENCE_BATCH = 8
_SMOOTHING = 0.05


class SpeedMeter:
    """`small` and `large` are (tokens in the step, seconds) as measured at start, before any request."""

    def __init__(self, small: tuple[int, float], large: tuple[int, float]) -> None:
        self._per_token_s = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        self._fixed_s = max(1e-9, small[1] - self._per_token_s * small[0])
        self._slowdown = 1.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Take in one step. Much larger ones than what was measured are not comparable."""
        if num_tokens <= 8 * REFERENCE_BATCH:
            self._slowdown += _SMOOTHING * (seconds / self._expected_s(num_tokens) - self._slowdown)

    def _expected_s(self, num_tokens: int) -> float:
        return self._fixed_s + self._per_token_s * num_tokens

    @property
    def tokens_per_s(self) -> float:
        return REFERENCE_BATCH / (self._expected_s(REFERENCE_BATCH) * self._slowdown)
