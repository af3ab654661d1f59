"""Outlier detection: finds workers that refuse requests which other workers answer.

A refusal (a 4xx, or a 429 or 503 when full) is usually right, so the controller's circuit breaker does not count it. It
is wrong if another worker answers the same request. So:

- A 4xx is passed to the client at once only if the worker's previous answer was a success. Otherwise another worker is
  tried too, and its answer counts.
- A worker that was overruled `OVERRULED_LIMIT` times in a row is avoided for `AVOID_S`: other workers are preferred.

A worker that refuses everything thus gets a request now and then, and clients do not notice. A client that sends only
invalid requests has each of them refused by two workers.

No I/O. `clock` gives monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OVERRULED_LIMIT = 3
AVOID_S = 10.0
MAX_WORKERS = 4096
"""Workers that are remembered; the oldest is forgotten first."""
MAX_AVOIDED = 32
"""Workers that are avoided at the same time; the controller accepts a bounded list of them."""


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
        """The worker answered a request properly."""
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
        """Workers that should get a request only if there are no others; at most MAX_AVOIDED."""
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
