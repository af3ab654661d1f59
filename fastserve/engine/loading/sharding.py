"""How one weight is divided over ranks: pure functions of sizes, without torch.

A rank's part of a weight is a list of ranges of one dimension. There is more than one range where a weight consists of
several parts that are each divided (queries, keys and values in one tensor; gate and up in one tensor).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
"""(begin, end)"""
_UNITS = (64, 32, 16, 8, 4, 2, 1)
"""Ranges of large dimensions begin at multiples of the first of these that divides the work evenly: kernels and
quantized groups are aligned then."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a weight that one rank holds."""

    whole: tuple[int, ...]
    """Shape of the whole weight."""
    dim: int
    ranges: tuple[Range, ...]
    """Ranges of `dim`, in the order in which they are stored."""

    @property
    def size(self) -> int:
        """Number of entries along `dim`."""
        return sum(end - begin for begin, end in self.ranges)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.whole[: self.dim], self.size, *self.whole[self.dim + 1 :])

    @property
    def share(self) -> float:
        """Share of the whole weight."""
        return self.size / max(1, self.whole[self.dim])

    def transposed(self) -> Shard:
        """The same part of the transposed matrix."""
        return Shard(self.whole[::-1], len(self.whole) - 1 - self.dim, self.ranges)

    def without_first_dim(self) -> Shard:
        """The same part of each of the tensors that the weight is a stack of."""
        return Shard(self.whole[1:], self.dim - 1, self.ranges)

    def piece(self, dim: int, index: int, count: int) -> Shard:
        """The part of piece `index`, where the weight is a concatenation of `count` pieces of one size along `dim`."""
        size = self.whole[dim] // count
        whole = (*self.whole[:dim], size, *self.whole[dim + 1 :])
        if dim != self.dim:
            return Shard(whole, self.dim, self.ranges)
        first = index * size
        inside = ((max(begin, first) - first, min(end, first + size) - first) for begin, end in self.ranges)
        return Shard(whole, dim, tuple((begin, end) for begin, end in inside if begin < end))


@dataclass(frozen=True, slots=True)
class Sharding:
    """The parts of a weight that all ranks hold. A part may be held by several ranks."""

    whole: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[Range, ...], ...]
    """By rank."""

    def of(self, rank: int) -> Shard:
        return Shard(self.whole, self.dim, self.ranges[rank])

    @property
    def is_concatenation(self) -> bool:
        """Whether all parts in rank order, one after the other, are the whole weight."""
        flat = list(itertools.chain.from_iterable(self.ranges))
        ends = [0, *(end for _, end in flat)]
        return ends[-1] == self.whole[self.dim] and all(r[0] == end for r, end in zip(flat, ends, strict=False))


def split_evenly(total: int, count: int, unit: int | None = None) -> list[Range]:
    """Divide 0..total into `count` ranges of about one size. With `unit`, each begins at a multiple of it; otherwise at
    multiples of the largest alignment that costs no balance. Raises ValueError when a range would be empty."""
    if unit is None:
        unit = next((unit for unit in _UNITS if total % (unit * count) == 0), None)
        unit = unit or next(unit for unit in _UNITS if unit == 1 or total >= 16 * unit * count)
    units = -(-total // unit)
    if units < count:
        raise ValueError(f"{total} cannot be divided by {count}")
    edges = [units * index // count * unit for index in range(count)] + [total]
    return list(itertools.pairwise(edges))


@dataclass(frozen=True, slots=True)
class HeadRanges:
    """Attention heads of each rank."""

    query: tuple[Range, ...]
    kv: tuple[Range, ...]
    counts: tuple[bool, ...]
    """Whether the rank is the first that holds its KV heads, which several may hold."""


def split_heads(heads: int, kv_heads: int, count: int) -> HeadRanges:
    """Divide query heads over `count` ranks; each rank has the KV heads of its query heads, and as many query heads for
    each of them. Where there are fewer KV heads than ranks, several ranks have the same one. Raises ValueError when a
    rank would have no head."""
    group = heads // max(1, kv_heads)
    if heads % max(1, kv_heads) or count > heads:
        raise ValueError(f"{heads} heads cannot be divided by {count}")
    if kv_heads >= count:
        kv = split_evenly(kv_heads, count, 1)
        query = [(begin * group, end * group) for begin, end in kv]
        return HeadRanges(tuple(query), tuple(kv), (True,) * count)
    query, kv, counts = [], [], []
    for head, (first, last) in enumerate(split_evenly(count, kv_heads, 1)):
        for index, (begin, end) in enumerate(split_evenly(group, last - first, 1)):
            query.append((head * group + begin, head * group + end))
            kv.append((head, head + 1))
            counts.append(index == 0)
    return HeadRanges(tuple(query), tuple(kv), tuple(counts))


def sharding_of(whole: Sequence[int], dim: int, ranges: Iterable[Range], unit: int = 1, parts: int = 1) -> Sharding:
    """Divide `dim` by `ranges` of units of `unit` entries; with `parts`, each of as many equal parts of `dim`."""
    step = whole[dim] // parts
    return Sharding(
        tuple(whole),
        dim,
        tuple(
            tuple((part * step + begin * unit, part * step + end * unit) for part in range(parts))
            for begin, end in ranges
        ),
    )
