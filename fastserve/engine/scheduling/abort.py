"""Requests whose first token would be too late are given up, so that others are served in time (`--enable-abort`).

Under overload the newest request is first, because it can still be served in time; otherwise the oldest one. Overload
means that more requests arrive than start, in the moving averages of their numbers from one start to the next. Requests
that have begun are never given up, and go before others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as AnySequence

from fastserve.engine.scheduling import Settings
from fastserve.engine.scheduling.queue import WaitingQueue
from fastserve.engine.sequence import Sequence

PREFILL_S = 0.5
"""Time from the start of a request to its first token that is reckoned with."""
_KEPT = 0.7
"""Weight of the past in the moving averages."""


class Policy:
    def __init__(self, settings: Settings) -> None:
        self._max_wait_s = max(0.0, settings.first_token_slo_s - PREFILL_S)
        self._oldest = WaitingQueue()
        self._newest = WaitingQueue()
        self._arrivals: deque[Sequence] = deque()
        """Sequences that have not begun, in the order of their arrival, and some that have, or have ended."""
        self._last_id = -1
        self._num_arrived = 0
        self._num_started = 0
        self._mean_arrived = 0.0
        self._mean_started = 0.0

    def add(self, sequence: Sequence) -> None:
        begins = not sequence.is_begun
        self._oldest.add((begins, *sequence.order), sequence)
        self._newest.add((begins, sequence.request.priority, -sequence.seq_id), sequence)
        if sequence.seq_id > self._last_id:
            self._last_id = sequence.seq_id
            self._num_arrived += 1
            self._arrivals.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._oldest.remove(sequence)
        self._newest.remove(sequence)

    def first(self, running: AnySequence[Sequence]) -> Sequence | None:
        queue = self._newest if self._mean_arrived > self._mean_started else self._oldest
        return queue.first()

    def victim(self, running: AnySequence[Sequence]) -> Sequence:
        return running[-1]

    def yields_to(self, first: Sequence, running: AnySequence[Sequence]) -> Sequence | None:
        return None

    def max_prefill_tokens(self, sequence: Sequence, prefills: AnySequence[tuple[Sequence, int]]) -> int:
        return sequence.num_tokens

    def served(self, sequence: Sequence, num_input_tokens: int, num_output_tokens: int) -> None:
        self._num_started += num_input_tokens > 0

    def ended(self, sequence: Sequence) -> None:
        pass

    def too_late(self, now_s: float) -> AnySequence[Sequence]:
        if self._num_started:
            self._mean_arrived = _KEPT * self._mean_arrived + (1 - _KEPT) * self._num_arrived
            self._mean_started = _KEPT * self._mean_started + (1 - _KEPT) * self._num_started
            self._num_arrived = self._num_started = 0
        late = []
        while self._arrivals and (
            self._arrivals[0].is_over or self._arrivals[0].is_begun or self._is_late(self._arrivals[0], now_s)
        ):
            sequence = self._arrivals.popleft()
            if not (sequence.is_begun or sequence.is_over):
                late.append(sequence)
        return late

    def _is_late(self, sequence: Sequence, now_s: float) -> bool:
        return now_s - sequence.arrived_s > self._max_wait_s
