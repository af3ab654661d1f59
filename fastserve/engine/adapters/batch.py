"""The inputs of products with adapters: the rows of a step by adapter, and where a layer's low-rank matrices are.

Kernels see these two types alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

NO_SLOT = 0
"""Slot of rows without an adapter."""


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """The rows of a packed batch that have an adapter, sorted by adapter. Rows of the bare base are not among them."""

    row_index: npt.NDArray[np.int32]
    """(rows,) rows of the packed batch; those of a segment are ascending"""
    segment_start: npt.NDArray[np.int32]
    """(segments + 1,) first row of each segment in `row_index`, and their end"""
    segment_slot: npt.NDArray[np.int32]
    """(segments,) slot of each segment's adapter, ascending"""

    @classmethod
    def of(cls, slots: Sequence[int] | npt.NDArray[Any]) -> AdapterBatch | None:
        """`slots`: the slot of each row of the packed batch. None where no row has an adapter."""
        of_row = np.asarray(slots, dtype=np.int32)
        order = np.argsort(of_row, kind="stable").astype(np.int32)
        row_index = order[np.searchsorted(of_row[order], NO_SLOT, side="right") :]
        if not len(row_index):
            return None
        sorted_slots = of_row[row_index]
        begins = np.flatnonzero(np.diff(sorted_slots, prepend=NO_SLOT))
        segment_start = np.append(begins, len(row_index)).astype(np.int32)
        return cls(row_index, segment_start, sorted_slots[begins])

    def slots(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The slots of some rows of the packed batch."""
        of_row = np.full(1 + max(int(rows.max()), int(self.row_index.max())), NO_SLOT, dtype=np.int32)
        of_row[self.row_index] = np.repeat(self.segment_slot, np.diff(self.segment_start))
        return of_row[rows]

    def select(self, rows: npt.NDArray[np.int64]) -> AdapterBatch | None:
        """The batch that consists of these rows, in their order."""
        return AdapterBatch.of(self.slots(rows))


@dataclass(frozen=True, slots=True)
class SiteTables:
    """One site: a linear layer that adapters change, or a part of a joined one. The tensors keep their addresses for
    the life of the engine; their entries change between steps. Entry 0 of each is that of no adapter.

    Tile i of an adapter is at `plane_addresses[i // tiles_per_plane] + (i % tiles_per_plane) * tile_bytes`, where
    `planes[slot]` is the address of the slot's `plane_addresses` (int64). With g rank groups, tile
    `first_tile + group * num_in_tiles + k` holds A for a rank group and slice k of the inputs, and tile
    `first_tile + g * num_in_tiles + group * num_out_tiles + n` holds B for slice n of the outputs. The order of the
    values within a tile is that of tiles.py.
    """

    planes: torch.Tensor
    """(slots,) int64"""
    first_tile: torch.Tensor
    """(slots,) int32"""
    rank_groups: torch.Tensor
    """(slots,) int32; 0: the adapter does not change this layer"""
    in_size: int
    out_size: int
    out_begin: int
    """First of the `out_size` outputs in the product of the (joined) layer."""
    tile_width: int
    """Inputs or outputs in a tile."""
    tiles_per_plane: int

    @property
    def num_in_tiles(self) -> int:
        return -(-self.in_size // self.tile_width)

    @property
    def num_out_tiles(self) -> int:
        return -(-self.out_size // self.tile_width)
