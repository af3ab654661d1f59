"""A rate of bytes that all connections of a process share."""

from __future__ import annotations

from collections.abc import Callable


class BytePacer:
    """Says how long to wait after bytes were read, so that no more than `bytes_per_s` are read on average.

    After a pause up to `burst_bytes` are free. Those who wait do so in order of arrival.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: int, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._clock = clock
        self._paid_until = float("-inf")
        """When the bytes so far will be within the rate, were there no burst."""

    def take(self, num_bytes: int) -> float:
        """Count these bytes; returns the seconds to wait before more are read."""
        now = self._clock()
        self._paid_until = max(self._paid_until, now - self._burst_s) + num_bytes / self._bytes_per_s
        return max(0.0, self._paid_until - now)
