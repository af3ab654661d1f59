"""Buckets: what is filled in comes out again."""

from __future__ import annotations

import random

import torch

from fastserve.engine.weight_updates.buckets import fill_bucket, split_bucket

DTYPES = (torch.bfloat16, torch.uint8, torch.float32, torch.int64)


def test_tensors_of_any_sizes_and_dtypes_come_out_of_a_bucket_as_they_went_in() -> None:
    for seed in range(20):
        chosen = random.Random(seed)
        torch.manual_seed(seed)
        shapes = [tuple(chosen.choice((0, 1, 3, 40, 200)) for _ in range(chosen.randrange(4))) for _ in range(12)]
        tensors = [torch.rand(shape).mul(99).to(chosen.choice(DTYPES)) for shape in shapes]
        if tensors[0].dim() == 2:
            tensors[0] = tensors[0].t()
        size = sum(tensor.nbytes for tensor in tensors)
        filled = fill_bucket(torch.empty(size + 8, dtype=torch.uint8), [(tensor, tensor.dtype) for tensor in tensors])
        assert filled.numel() == size
        found = split_bucket(filled, [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])
        assert [one.dtype for one in found] == [one.dtype for one in tensors]
        assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


def test_tensors_are_converted_as_they_are_filled_in() -> None:
    parts = [(torch.rand(shape) * 9, dtype) for shape in ((3,), (200, 300), (1,), (70, 500)) for dtype in DTYPES]
    size = sum(tensor.numel() * dtype.itemsize for tensor, dtype in parts)
    filled = fill_bucket(torch.empty(size, dtype=torch.uint8), parts)
    found = split_bucket(filled, [(dtype, tuple(tensor.shape)) for tensor, dtype in parts])
    assert all(torch.equal(one, tensor.to(dtype)) for one, (tensor, dtype) in zip(found, parts, strict=True))
