"""Retry budget: bounds how much the retries add to the load, as in Finagle and Envoy.

Each arriving request adds a fraction of a retry to the budget; each retry takes 1. A minimum rate lets a server with
few requests retry too. Only the last `WINDOW_S` count, so a quiet time saves nothing up for a retry storm.

When a worker dies, its running requests have to be retried once, whatever the budget. The caller adds these with
`grant`, at most once for each death.

No I/O. `clock` gives monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0
SLOT_S = 1.0
"""Amounts are summed over slots of this length, so that memory does not grow with the load."""


class RetryBudget:
    def __init__(self, clock: Callable[[], float], percent: float, min_retries_per_s: float) -> None:
        """`percent`: retries allowed for each hundred requests."""
        self._clock = clock
        self._share = percent / 100.0
        self._floor = min_retries_per_s * WINDOW_S
        self._slots: deque[list[float]] = deque()
        """Start time and balance (added minus taken) of each slot."""

    def note_request(self) -> None:
        """A client's request has arrived."""
        self._add(self._share)

    def grant(self, num_retries: int) -> None:
        """Allow this many additional retries within the window."""
        self._add(float(num_retries))

    def try_spend(self) -> bool:
        """Take one retry. Returns False, and takes nothing, if the budget is used up."""
        if self.balance() < 1.0:
            return False
        self._add(-1.0)
        return True

    def balance(self) -> float:
        """Retries that are allowed now."""
        oldest = self._clock() - WINDOW_S
        while self._slots and self._slots[0][0] <= oldest:
            self._slots.popleft()
        return self._floor + sum(amount for _, amount in self._slots)

    def _add(self, amount: float) -> None:
        now = self._clock()
        if not self._slots or now - self._slots[-1][0] >= SLOT_S:
            self.balance()  # drops old slots
            self._slots.append([now, 0.0])
        self._slots[-1][1] += amount
