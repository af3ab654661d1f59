"""Memory of large tensors: zeros that overlap nothing, in huge pages where there are any."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastserve.engine import huge_pages
from fastserve.engine.huge_pages import close_mappings, map_bytes, zeros

SIZES = [(3,), (1 << 16,), (100_001,), (300, 1000), (5 << 20,), (70 << 20,), (7, 11, 1301)]


def mappings() -> Iterator[list[str]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        yield line.split()[0].split("-")


@pytest.fixture(autouse=True)
def closed() -> None:
    close_mappings()


def test_tensors_are_zeros_of_their_own() -> None:
    made = [zeros(shape, torch.uint8) for shape in SIZES * 2]
    for index, tensor in enumerate(made):
        assert tensor.shape == (SIZES * 2)[index]
        assert tensor.is_contiguous()
        assert not tensor.any()
        tensor.fill_(index + 1)
    for index, tensor in enumerate(made):
        assert (tensor == index + 1).all(), "it overlaps another one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_dtypes(dtype: torch.dtype) -> None:
    zeros((99_999,), torch.uint8)  # what comes next is aligned all the same
    tensor = zeros((123, 457), dtype)
    assert tensor.dtype is dtype
    assert tensor.data_ptr() % 64 == 0
    assert tensor.sum() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_mapping_goes_with_its_last_tensor() -> None:
    first, second = zeros((1 << 20,), torch.uint8), zeros((1 << 20,), torch.uint8)
    assert second.data_ptr() - first.data_ptr() == 1 << 20, "both are cut from one mapping"

    def is_mapped() -> bool:
        """Whether the pages of the second are there still."""
        return any(int(low, 16) <= address < int(high, 16) for low, high in mappings())

    address = second.data_ptr()
    del first
    close_mappings()
    gc.collect()
    assert is_mapped()
    del second
    gc.collect()
    assert not is_mapped()


def test_without_room_for_a_whole_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(huge_pages, "map_bytes", full)
    tensor = zeros((1 << 20,), torch.float32)
    assert tensor.shape == (1 << 20,)
    assert not tensor.any()


def test_large_mappings_begin_with_a_huge_page() -> None:
    for size in (1, 4096, 1 << 21, (1 << 21) + 1, 9_000_001):
        memory = map_bytes(size)
        assert len(memory) == size
        assert not memory.any()
        memory[:] = 7
        if size >= 1 << 21:
            assert memory.ctypes.data % (1 << 21) == 0
