"""Circuit breaker for one worker, as in Envoy's outlier detection.

closed (requests pass) --`threshold` failures in a row--> open (none passes) --`open_s` later--> half-open (one request
passes as a probe) --success--> closed, or --failure--> open again, for twice as long, up to `MAX_OPEN_S`.

No I/O and no clock: callers pass the time, in monotonic seconds. The owner of a fleet's breakers keeps at least half of
the fleet in use (`fleet_allows`).
"""

from __future__ import annotations

from typing import Literal

FAILURE_THRESHOLD = 5
OPEN_S = 10.0
MAX_OPEN_S = 30.0
PROBE_TIMEOUT_S = 30.0
"""A probe without a result after this time counts as lost, and another request may probe."""

State = Literal["closed", "open", "half-open"]


class Breaker:
    __slots__ = ("_failures", "_first_open_s", "_open_s", "_opened_at", "_probe_since", "_threshold")

    def __init__(self, threshold: int = FAILURE_THRESHOLD, open_s: float = OPEN_S) -> None:
        self._threshold = threshold
        self._first_open_s = open_s
        self._open_s = open_s
        self._failures = 0
        self._opened_at: float | None = None
        self._probe_since: float | None = None

    @property
    def is_closed(self) -> bool:
        return self._opened_at is None

    def state(self, now: float) -> State:
        if self._opened_at is None:
            return "closed"
        return "half-open" if now - self._opened_at >= self._open_s else "open"

    def allows(self, now: float) -> bool:
        """Whether a request may be sent to the worker now. Changes nothing."""
        state = self.state(now)
        if state != "half-open":
            return state == "closed"
        return self._probe_since is None or now - self._probe_since >= PROBE_TIMEOUT_S

    def start(self, now: float) -> None:
        """A request is being sent to the worker; in the half-open state it is the probe."""
        if self.state(now) == "half-open":
            self._probe_since = now

    def succeed(self, sent_at: float | None = None) -> None:
        """Note a success. It does not close a breaker that opened after the request was sent (`sent_at`, on the same
        clock).
        """
        if self._opened_at is not None and sent_at is not None and sent_at < self._opened_at:
            return
        self._failures = 0
        self._opened_at = None
        self._probe_since = None
        self._open_s = self._first_open_s

    def withdraw(self) -> None:
        """End the probe without a result (client disconnected, or never sent). Another request may probe."""
        self._probe_since = None

    def fail(self, now: float, sent_at: float | None = None) -> bool:
        """Note a failure; returns whether it opened the breaker. Ignored if the breaker opened after the request was
        sent (`sent_at`, on the same clock).
        """
        if self._opened_at is not None and sent_at is not None and sent_at < self._opened_at:
            return False
        self._failures += 1
        state = self.state(now)
        if state == "open":
            return False
        if state == "half-open":
            self._open_s = min(2 * self._open_s, MAX_OPEN_S)
        elif self._failures < self._threshold:
            return False
        self._opened_at = now
        self._probe_since = None
        return True

    def next_probe_s(self, now: float) -> float:
        """Seconds until a probe may pass; 0 when requests pass now."""
        if self.allows(now) or self._opened_at is None:
            return 0.0
        if self.state(now) == "open":
            return self._opened_at + self._open_s - now
        return 0.0 if self._probe_since is None else self._probe_since + PROBE_TIMEOUT_S - now


def fleet_allows(num_out: int, num_workers: int) -> bool:
    """Whether one more worker of a fleet may be taken out by its breaker: at most half of them may be out."""
    return 2 * (num_out + 1) <= num_workers
