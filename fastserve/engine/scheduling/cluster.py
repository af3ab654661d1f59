"""First come, first served, but with few adapters at once (S-LoRA's `--batch-num-adapters`).

While running sequences have that many different adapters, sequences with one of these, or with none, go before others.
They pass only sequences that arrived up to MAX_PASSED_S before them, so that no adapter starves.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence

from fastserve.engine.scheduling import Settings, slora
from fastserve.engine.scheduling.queue import WaitingQueue
from fastserve.engine.sequence import Sequence

MAX_PASSED_S = 10.0


class Policy(slora.Policy):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._max_adapters = settings.batch_num_adapters
        self._by_adapter: dict[str, WaitingQueue] = {}

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self._by_adapter.setdefault(sequence.request.adapter, WaitingQueue()).add(sequence.order, sequence)

    def remove(self, sequence: Sequence) -> None:
        super().remove(sequence)
        queue = self._by_adapter.get(sequence.request.adapter)
        if queue is not None:
            queue.remove(sequence)
            if not queue:
                del self._by_adapter[sequence.request.adapter]

    def first(self, running: AnySequence[Sequence]) -> Sequence | None:
        """Costs O(log n) for each adapter that runs."""
        first = super().first(running)
        adapters = {sequence.request.adapter for sequence in running} | {""}
        if first is None or first.request.adapter in adapters or len(adapters) - 1 < self._max_adapters:
            return first
        heads = [head for name in adapters if name in self._by_adapter and (head := self._by_adapter[name].first())]
        best = min(heads, key=lambda head: head.order, default=first)
        return best if best.due - first.due <= MAX_PASSED_S else first
