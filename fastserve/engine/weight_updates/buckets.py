"""Buckets: the bytes of several tensors that travel together, for sender and receiver."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

ItemT = TypeVar("ItemT")
_RUN_BYTES = 1 << 15
"""Small tensors are copied together up to this size, from which torch starts threads for a copy."""


def split_into_buckets(
    items: Sequence[ItemT], num_bytes: Callable[[ItemT], int], max_bytes: int | None
) -> list[list[ItemT]]:
    """Divide items, in order: a bucket ends before the item with which it would have more than `max_bytes`, so a larger
    item has its own. None: one item each."""
    found: list[list[ItemT]] = []
    size = 0
    for item in items:
        if max_bytes is None or not found or size + num_bytes(item) > max_bytes:
            found.append([])
            size = 0
        found[-1].append(item)
        size += num_bytes(item)
    return found


Part = tuple[torch.Tensor, torch.dtype]
"""A tensor, and the dtype that it travels in."""


def part_bytes(part: Part) -> int:
    tensor, dtype = part
    return int(tensor.numel()) * int(dtype.itemsize)


def bytes_of(part: Part) -> torch.Tensor:
    """The bytes of a tensor, in its own memory where dtype and order allow that."""
    tensor, dtype = part
    return tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8)


def fill_bucket(buffer: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Copy the bytes of the tensors into the buffer of bytes, without gaps; return the part that they take."""
    at = 0
    for run in split_into_buckets(parts, part_bytes, _RUN_BYTES):
        can_join = len(run) > 1 and len({tensor.device for tensor, _ in run}) == 1
        for part in [(torch.cat([bytes_of(one) for one in run]), torch.uint8)] if can_join else run:
            tensor, dtype = part
            place = buffer[at : at + part_bytes(part)]
            if at % dtype.itemsize:  # a view must begin at a multiple of its items
                place.copy_(bytes_of(part))
            else:
                place.view(dtype).view(tensor.shape).copy_(tensor)
            at += place.numel()
    return buffer[:at]


def split_bucket(bucket: torch.Tensor, sizes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[torch.Tensor]:
    """The tensors of a bucket of bytes, in order and without gaps between them."""
    found: list[torch.Tensor] = []
    at = 0
    for dtype, run in itertools.groupby(sizes, lambda size: size[0]):
        shapes = [shape for _, shape in run]
        counts = [math.prod(shape) for shape in shapes]
        num_bytes = sum(counts) * dtype.itemsize
        part = bucket[at : at + num_bytes]
        if at % dtype.itemsize:
            part = part.clone()  # a view must begin at a multiple of its items
        found += [one.view(shape) for one, shape in zip(part.view(dtype).split(counts), shapes, strict=True)]
        at += num_bytes
    return found
