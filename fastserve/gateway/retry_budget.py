"""Retry budget: bounds how much the retries add to the load, as in Finagle and Envoy.

Each request that arrives pays in a share of a retry; each retry takes a whole one. A floor per second lets a quiet
server retry at all. What was paid in more than `WINDOW_S` ago no longer counts, so a long quiet time saves nothing up
for a storm.

A worker's death is no storm: the requests that were running on it have to move, once, wherever the budget stands. For
these `grant` pays in; the caller does so at most once for a death.

Pure: time, in seconds of any monotonic clock, comes from the clock given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0
SLOT_S = 1.0
"""Payments are summed up over this time, so that the memory does not grow with the load."""


class RetryBudget:
    def __init__(self, clock: Callable[[], float], percent: float, min_retries_per_s: float) -> None:
        """`percent`: how many retries a hundred requests pay for."""
        self._clock = clock
        self._share = percent / 100.0
        self._floor = min_retries_per_s * WINDOW_S
        self._slots: deque[list[float]] = deque()
        """Start of each slot, and its balance: paid in minus taken out."""

    def note_request(self) -> None:
        """A client's request has arrived."""
        self._add(self._share)

    def grant(self, num_retries: int) -> None:
        """Allow so many retries more within the window."""
        self._add(float(num_retries))

    def try_spend(self) -> bool:
        """Take one retry out. Returns False, and takes nothing, when the budget is used up."""
        if self.balance() < 1.0:
            return False
        self._add(-1.0)
        return True

    def balance(self) -> float:
        """Retries that may be made now."""
        oldest = self._clock() - WINDOW_S
        while self._slots and self._slots[0][0] <= oldest:
            self._slots.popleft()
        return self._floor + sum(amount for _, amount in self._slots)

    def _add(self, amount: float) -> None:
        now = self._clock()
        if not self._slots or now - self._slots[-1][0] >= SLOT_S:
            self.balance()  # drops what is too old
            self._slots.append([now, 0.0])
        self._slots[-1][1] += amount
