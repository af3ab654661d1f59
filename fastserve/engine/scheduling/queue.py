"""A queue of waiting sequences from which any may be removed."""

from __future__ import annotations

import heapq
import itertools
from typing import Any

from fastserve.engine.sequence import Sequence

_MIN_STALE = 64
"""Removed entries that a heap may keep in any case."""


class WaitingQueue:
    """A heap. Removed sequences stay in it until they come to its top, or are half of it."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Sequence]] = []
        self._entries: dict[int, int] = {}
        """Number of the valid entry by sequence id."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._entries

    def add(self, key: Any, sequence: Sequence) -> None:
        """Add a sequence that is not in it. The smallest key is first."""
        number = self._entries[sequence.seq_id] = next(self._numbers)
        heapq.heappush(self._heap, (key, number, sequence))

    def remove(self, sequence: Sequence) -> bool:
        """Whether it was in the queue."""
        if self._entries.pop(sequence.seq_id, None) is None:
            return False
        if len(self._heap) > 2 * len(self._entries) + _MIN_STALE:
            self._heap = [entry for entry in self._heap if self._is_valid(entry)]
            heapq.heapify(self._heap)
        return True

    def first(self) -> Sequence | None:
        while self._heap and not self._is_valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def _is_valid(self, entry: tuple[Any, int, Sequence]) -> bool:
        return self._entries.get(entry[2].seq_id) == entry[1]
