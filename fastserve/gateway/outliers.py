"""Outlier detection: workers whose refusals other workers do not share.

A refusal (a 4xx for the request, a 429 or 503 for want of room) is a right answer most of the time, so it says nothing
against a worker, and the controller's circuit breaker does not see it. It is wrong when another worker answers the very
same request. Two things follow:

- A 4xx is passed to the client at once only when the worker's last answer before it was a success. Otherwise it is
  checked: another worker is asked too, and its answer counts.
- A worker that was overruled `OVERRULED_LIMIT` times in a row is avoided for `AVOID_S`: other workers are preferred.

So a worker that refuses everything costs a request every now and then, of which clients see nothing; and a client that
sends nothing but invalid requests has them refused by two workers instead of one.

Pure: time, in seconds of any monotonic clock, comes from the clock given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OVERRULED_LIMIT = 3
AVOID_S = 10.0
MAX_WORKERS = 4096
"""How many workers are remembered; the one that was heard of first is forgotten first."""
MAX_AVOIDED = 32
"""How many workers are avoided at a time; the controller takes a bounded list of them."""


@dataclass(slots=True)
class _Record:
    is_proven: bool = False
    num_overruled: int = 0


class OutlierDetector:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}
        self._avoid_until: dict[str, float] = {}

    def note_success(self, address: str) -> None:
        """The worker answered a request as it should."""
        record = self._record(address)
        record.is_proven, record.num_overruled = True, 0
        self._avoid_until.pop(address, None)

    def note_refusal(self, address: str) -> None:
        """The worker refused a request."""
        self._record(address).is_proven = False

    def note_overruled(self, address: str) -> None:
        """Another worker answered a request that this one had refused."""
        record = self._record(address)
        record.num_overruled += 1
        if record.num_overruled >= OVERRULED_LIMIT and len(self._avoid_until) < MAX_AVOIDED:
            self._avoid_until[address] = self._clock() + AVOID_S

    def is_proven(self, address: str) -> bool:
        """Whether the worker's last answer was a success."""
        record = self._records.get(address)
        return record is not None and record.is_proven

    def avoided(self) -> list[str]:
        """The workers that should get a request only when there are no others; at most MAX_AVOIDED."""
        if self._avoid_until:
            now = self._clock()
            self._avoid_until = {address: until for address, until in self._avoid_until.items() if until > now}
        return list(self._avoid_until)

    def _record(self, address: str) -> _Record:
        record = self._records.get(address)
        if record is None:
            if len(self._records) >= MAX_WORKERS:
                del self._records[next(iter(self._records))]
            record = self._records[address] = _Record()
        return record
