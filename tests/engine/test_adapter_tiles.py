"""Tiles of low-rank matrices, and the rows of a batch by adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastserve.engine.adapters.batch import AdapterBatch
from fastserve.engine.adapters.tiles import num_rank_groups, num_tiles, pack_tiles, tile_width, unpack_tiles


@pytest.mark.parametrize(
    ("rank", "in_size", "out_size", "width"), [(1, 5, 3, 16), (8, 64, 32, 32), (20, 130, 257, 128)]
)
def test_unpacking_gives_the_packed_matrices_padded_with_zero_ranks(
    rank: int, in_size: int, out_size: int, width: int
) -> None:
    a, b = torch.randn(rank, in_size), torch.randn(out_size, rank)
    tiles = pack_tiles(a, b, width)
    assert tiles.shape == (num_tiles(rank, in_size, out_size, width), 8 * width)
    found_a, found_b = unpack_tiles(tiles, num_rank_groups(rank), in_size, out_size, width)
    assert torch.equal(found_a[:rank], a)
    assert torch.equal(found_b[:, :rank], b)
    assert not found_a[rank:].any()
    assert not found_b[:, rank:].any()


def test_a_tile_fits_the_smallest_plane() -> None:
    assert [tile_width(8 * size) for size in (127, 128, 31, 15)] == [64, 128, 16, None]


def test_rows_are_sorted_by_adapter_and_bare_rows_left_out() -> None:
    batch = AdapterBatch.of(np.array([0, 3, 1, 3, 0, 1, 3]))
    assert batch is not None
    assert batch.row_index.tolist() == [2, 5, 1, 3, 6]
    assert batch.segment_start.tolist() == [0, 2, 5]
    assert batch.segment_slot.tolist() == [1, 3]
    assert AdapterBatch.of([0, 0]) is None
    assert AdapterBatch.of([]) is None
