"""The worker with the fewest requests relative to its speed; a random one among equals, so that idle workers share.

Workers with the same wait (requests divided by speed) share a bucket, and a heap orders the buckets. An empty bucket
leaves the heap when it reaches the top, or when the heap is compacted.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Collection

MIN_HEAP_TO_COMPACT = 64


class Index:
    def __init__(self) -> None:
        self._wait: dict[str, float] = {}
        self._buckets: dict[float, list[str]] = {}
        self._position: dict[str, int] = {}
        """Each worker's position in its bucket."""
        self._heap: list[float] = []
        """Waits of all buckets, and of some that were removed; unique."""
        self._in_heap: set[float] = set()

    def set(self, address: str, speed: float, in_flight: int) -> None:
        wait = in_flight / speed if speed > 0 else math.inf
        if self._wait.get(address) == wait:
            return
        self.remove(address)
        bucket = self._buckets.setdefault(wait, [])
        self._position[address] = len(bucket)
        bucket.append(address)
        self._wait[address] = wait
        if wait not in self._in_heap:
            self._in_heap.add(wait)
            heapq.heappush(self._heap, wait)
            if len(self._heap) > max(MIN_HEAP_TO_COMPACT, 2 * len(self._buckets)):
                self._heap = sorted(self._buckets)
                self._in_heap = set(self._heap)

    def remove(self, address: str) -> None:
        wait = self._wait.pop(address, None)
        if wait is None:
            return
        bucket = self._buckets[wait]
        position, last = self._position.pop(address), bucket.pop()
        if last != address:
            bucket[position] = last
            self._position[last] = position
        if not bucket:
            del self._buckets[wait]

    def choose(self, exclude: Collection[str], rng: random.Random) -> str | None:
        passed: list[float] = []
        chosen = None
        while self._heap and chosen is None:
            bucket = self._buckets.get(self._heap[0])
            if bucket is None:
                self._in_heap.discard(heapq.heappop(self._heap))
                continue
            chosen = _any_of(bucket, exclude, rng)
            if chosen is None:
                passed.append(heapq.heappop(self._heap))
        for wait in passed:
            heapq.heappush(self._heap, wait)
        return chosen


def _any_of(bucket: list[str], exclude: Collection[str], rng: random.Random) -> str | None:
    if not exclude:
        return bucket[int(rng.random() * len(bucket))]
    if len(bucket) > 2 * len(exclude):
        # At least half of the bucket is allowed: a few tries find one.
        while (chosen := bucket[int(rng.random() * len(bucket))]) in exclude:
            pass
        return chosen
    allowed = [address for address in bucket if address not in exclude]
    return allowed[int(rng.random() * len(allowed))] if allowed else None
