"""Buckets: the bytes of several tensors that travel together, for sender and receiver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

ItemT = TypeVar("ItemT")


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


def fill_bucket(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copy the bytes of the tensors into the buffer of bytes, without gaps; return the part that they take."""
    at = 0
    for tensor in tensors:
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        buffer[at : at + data.numel()].copy_(data)
        at += data.numel()
    return buffer[:at]


def split_bucket(bucket: torch.Tensor, sizes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[torch.Tensor]:
    """The tensors of a bucket of bytes, in order and without gaps between them."""
    found = []
    at = 0
    for dtype, shape in sizes:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        part = bucket[at : at + num_bytes]
        if at % dtype.itemsize:
            part = part.clone()  # a view must begin at a multiple of its items
        found.append(part.view(dtype).view(shape))
        at += num_bytes
    return found
