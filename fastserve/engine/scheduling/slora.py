"""First come, first served, where each level of priority counts as arriving later (`Sequence.order`). The default."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence

from fastserve.engine.scheduling import Settings
from fastserve.engine.scheduling.queue import WaitingQueue
from fastserve.engine.sequence import Sequence


class Policy:
    def __init__(self, settings: Settings) -> None:
        self._waiting = WaitingQueue()

    def add(self, sequence: Sequence) -> None:
        self._waiting.add(sequence.order, sequence)

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)

    def first(self, running: AnySequence[Sequence]) -> Sequence | None:
        return self._waiting.first()

    def victim(self, running: AnySequence[Sequence]) -> Sequence:
        return running[-1]

    def yields_to(self, first: Sequence, running: AnySequence[Sequence]) -> Sequence | None:
        return None

    def max_prefill_tokens(self, sequence: Sequence, prefills: AnySequence[tuple[Sequence, int]]) -> int:
        return sequence.num_tokens

    def served(self, sequence: Sequence, num_input_tokens: int, num_output_tokens: int) -> None:
        pass

    def ended(self, sequence: Sequence) -> None:
        pass

    def too_late(self, now_s: float) -> AnySequence[Sequence]:
        return ()
