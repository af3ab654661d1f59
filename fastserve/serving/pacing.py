"""Rate limit in bytes, shared by all connections of a process."""

from __future__ import annotations

from collections.abc import Callable


class BytePacer:
    """Gives the time to wait after each read, so that at most `bytes_per_s` are read on average.

    After a pause up to `burst_bytes` need no wait. Waiting callers continue in order of arrival.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: int, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._clock = clock
        self._paid_until = float("-inf")
        """Time at which the bytes so far are within the rate, without the burst."""

    def take(self, num_bytes: int) -> float:
        """Count `num_bytes`; returns the seconds to wait before the next read."""
        now = self._clock()
        self._paid_until = max(self._paid_until, now - self._burst_s) + num_bytes / self._bytes_per_s
        return max(0.0, self._paid_until - now)
