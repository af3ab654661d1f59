"""A random worker, weighted by speed. Needs no counts, so many controllers may do it side by side.

A Fenwick tree holds sums of the weights. They are integers, so that whatever is added and taken away again leaves the
sums exact.
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
        """A slot of a removed worker stays with weight 0, and is given to the next new one."""
        self._free: list[int] = []
        self._tree: list[int] = [0]
        """At `i`, from 1: the sum of the `i & -i` weights that end with slot `i - 1`."""
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
        """None when the speeds add up to nearly nothing."""
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
        # The new node covers the nodes that end before it, as far as its lowest bit reaches.
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
        """The slot whose share of the running sum holds `ticket`, a number from 0 to the total less 1."""
        slot, step = 0, 1 << len(self._weights).bit_length() - 1
        while step:
            if slot + step < len(self._tree) and self._tree[slot + step] <= ticket:
                slot += step
                ticket -= self._tree[slot]
            step //= 2
        return slot
