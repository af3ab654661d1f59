"""A random worker, weighted by speed. Needs no counts of requests, so it also works with several controllers.

A Fenwick tree holds sums of the weights. These are integers, so the sums stay exact after any number of updates.
"""

from __future__ import annotations

import random
from collections.abc import Collection

MIN_TOTAL_SPEED = 1e-4
UNITS = 1 << 24
"""Weight of an average worker."""


class Index:
    def __init__(self) -> None:
        self._slot: dict[str, int] = {}
        self._addresses: list[str] = []
        self._weights: list[int] = []
        """Weight by slot. The slot of a removed worker has weight 0 and is reused."""
        self._free: list[int] = []
        self._tree: list[int] = [0]
        """Fenwick tree, 1-based: node `i` is the sum of the `i & -i` weights up to slot `i - 1`."""
        self._total = 0

    def set(self, address: str, speed: float, in_flight: int) -> None:
        slot = self._slot.get(address)
        if slot is None:
            slot = self._slot[address] = self._new_slot(address)
        self._put(slot, round(speed * UNITS))

    def remove(self, address: str) -> None:
        slot = self._slot.pop(address, None)
        if slot is not None:
            self._put(slot, 0)
            self._free.append(slot)

    def choose(self, exclude: Collection[str], rng: random.Random) -> str | None:
        """None if the speeds add up to less than MIN_TOTAL_SPEED."""
        left_out = {slot: self._weights[slot] for address in exclude if (slot := self._slot.get(address)) is not None}
        for slot in left_out:
            self._put(slot, 0)
        try:
            if self._total < MIN_TOTAL_SPEED * UNITS:
                return None
            return self._addresses[self._find(rng.randrange(self._total))]
        finally:
            for slot, weight in left_out.items():
                self._put(slot, weight)

    def _new_slot(self, address: str) -> int:
        if self._free:
            slot = self._free.pop()
            self._addresses[slot] = address
            return slot
        self._addresses.append(address)
        self._weights.append(0)
        # The new node also sums the nodes before it that it covers.
        end = len(self._addresses)
        below, step = 0, 1
        while step < end & -end:
            below += self._tree[end - step]
            step *= 2
        self._tree.append(below)
        return end - 1

    def _put(self, slot: int, weight: int) -> None:
        change = weight - self._weights[slot]
        if not change:
            return
        self._weights[slot] = weight
        self._total += change
        node = slot + 1
        while node < len(self._tree):
            self._tree[node] += change
            node += node & -node

    def _find(self, ticket: int) -> int:
        """The slot whose interval of the cumulative weights contains `ticket`, 0 <= ticket < total."""
        slot, step = 0, 1 << len(self._weights).bit_length() - 1
        while step:
            if slot + step < len(self._tree) and self._tree[slot + step] <= ticket:
                slot += step
                ticket -= self._tree[slot]
            step //= 2
        return slot
