# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of kernels are Triton's own values, which have no types that a checker knows.
"""LoRA adapters of a batch in Triton: one grouped product with A and one with B for each site.

Programs work for pieces: at most 16 rows of one adapter. A program computes as many rank groups as its adapter has, so
ranks mix without padding to the largest. A sum over inputs is made of parts, which are added in their order: a row's
result depends neither on other rows nor on the order in which programs run.

This module needs the package triton. With TRITON_INTERPRET=1 set before it is imported, it runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from fastserve.engine.kernels.lora import RecordedRows, RowsByAdapter, TileOrder, TilesOfSite
from fastserve.engine.kernels.triton_lora_embedding import gather_columns

MAX_RANK = 256
"""The highest that --max-lora-rank allows."""
_ROWS = 16
"""Maximum rows of a piece; tensor cores multiply as many."""
_MAX_PARTS = 8
_MIN_SLICES = 4
"""Minimum slices of the inputs in a part of a sum."""


@triton.jit
def _tiles(plane, tile, PER_PLANE: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr):
    """Pointers to tiles."""
    address = tl.load(plane + tile // PER_PLANE)
    return address.to(tl.pointer_type(KIND)) + tile % PER_PLANE * SIZE


@triton.jit
def _shrink(
    x, parts, planes, first_tile, rank_groups, row_index, piece_slot, piece_begin, piece_end, rows, x_row,
    IN: tl.constexpr, WIDTH: tl.constexpr, PER_PLANE: tl.constexpr, SPLITS: tl.constexpr, MAX_RANK: tl.constexpr,
    ROWS: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One program for each piece and part of the inputs: `parts` (SPLITS, rows, MAX_RANK), float32, in sorted rows."""
    piece = tl.program_id(0)
    part = tl.program_id(1)
    begin = tl.load(piece_begin + piece)
    end = tl.load(piece_end + piece)
    slot = tl.load(piece_slot + piece)
    groups = tl.load(rank_groups + slot)
    if (end > begin) & (groups > 0):
        KIND: tl.constexpr = x.dtype.element_ty
        DOT: tl.constexpr = tl.float32 if IN_FLOAT32 else KIND
        SLICES: tl.constexpr = (IN + WIDTH - 1) // WIDTH
        at = begin + tl.arange(0, ROWS)
        there = at < end
        row = tl.load(row_index + at, mask=there, other=0).to(tl.int64)
        plane = tl.load(planes + slot).to(tl.pointer_type(tl.int64))
        first = tl.load(first_tile + slot)
        rank = tl.arange(0, 16)
        inner = tl.arange(0, WIDTH)
        for group in range(0, groups, 2):
            total = tl.zeros((ROWS, 16), tl.float32)
            mine = group + rank // 8
            has = mine < groups
            # A group that the adapter does not have is not read; its tile is the first one's.
            of_group = first + tl.where(has, mine, 0) * SLICES
            for slice in range(part * SLICES // SPLITS, (part + 1) * SLICES // SPLITS):
                column = slice * WIDTH + inner
                tile = _tiles(plane, of_group + slice, PER_PLANE, 8 * WIDTH, KIND)
                a = tl.load(tile[None, :] + (rank % 8)[None, :] * WIDTH + inner[:, None], mask=has[None, :], other=0.0)
                values = tl.load(
                    x + row[:, None] * x_row + column[None, :], mask=there[:, None] & (column < IN)[None, :], other=0.0
                )
                total += tl.dot(values.to(DOT), a.to(DOT), input_precision="ieee")
            to = parts + (part * rows + at[:, None]).to(tl.int64) * MAX_RANK + group * 8 + rank[None, :]
            tl.store(to, total, mask=there[:, None] & has[None, :])


@triton.jit
def _expand(
    parts, out, planes, first_tile, rank_groups, row_index, piece_slot, piece_begin, piece_end, rows, out_row,
    IN: tl.constexpr, OUT: tl.constexpr, OUT_BEGIN: tl.constexpr, WIDTH: tl.constexpr, PER_PLANE: tl.constexpr,
    SPLITS: tl.constexpr, MAX_RANK: tl.constexpr, ROWS: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One program for each piece and slice of the outputs."""
    piece = tl.program_id(0)
    slice = tl.program_id(1)
    begin = tl.load(piece_begin + piece)
    end = tl.load(piece_end + piece)
    slot = tl.load(piece_slot + piece)
    groups = tl.load(rank_groups + slot)
    if (end > begin) & (groups > 0):
        KIND: tl.constexpr = out.dtype.element_ty
        DOT: tl.constexpr = tl.float32 if IN_FLOAT32 else KIND
        IN_SLICES: tl.constexpr = (IN + WIDTH - 1) // WIDTH
        OUT_SLICES: tl.constexpr = (OUT + WIDTH - 1) // WIDTH
        at = begin + tl.arange(0, ROWS)
        there = at < end
        row = tl.load(row_index + at, mask=there, other=0).to(tl.int64)
        plane = tl.load(planes + slot).to(tl.pointer_type(tl.int64))
        first = tl.load(first_tile + slot) + groups * IN_SLICES + slice
        rank = tl.arange(0, 16)
        inner = tl.arange(0, WIDTH)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for group in range(0, groups, 2):
            mine = group + rank // 8
            has = mine < groups
            tile = _tiles(plane, first + tl.where(has, mine, 0) * OUT_SLICES, PER_PLANE, 8 * WIDTH, KIND)
            b = tl.load(tile[:, None] + (rank % 8)[:, None] * WIDTH + inner[None, :], mask=has[:, None], other=0.0)
            product = tl.zeros((ROWS, 16), tl.float32)
            for part in range(SPLITS):
                of_part = parts + (part * rows + at[:, None]).to(tl.int64) * MAX_RANK + group * 8 + rank[None, :]
                product += tl.load(of_part, mask=there[:, None] & has[None, :], other=0.0)
            total += tl.dot(product.to(KIND).to(DOT), b.to(DOT), input_precision="ieee")
        output = slice * WIDTH + inner
        to = out + row[:, None] * out_row + OUT_BEGIN + output[None, :]
        valid = there[:, None] & (output < OUT)[None, :]
        tl.store(to, (tl.load(to, mask=valid, other=0.0).to(tl.float32) + total).to(KIND), mask=valid)


@dataclass(frozen=True, slots=True)
class DeviceRows(RecordedRows):
    """The rows of a step by adapter on the device, int32, as pieces; a piece that ends where it begins has no rows."""

    row_index: torch.Tensor
    piece_slot: torch.Tensor
    piece_begin: torch.Tensor
    piece_end: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> DeviceRows:
        """Of fixed size, for recorded steps of at most `rows` rows."""
        return cls(*torch.zeros((4, rows), dtype=torch.int32, device=device))

    @classmethod
    def of(cls, batch: RowsByAdapter, device: torch.device) -> DeviceRows:
        index, pieces = torch.from_numpy(batch.row_index), torch.from_numpy(pieces_of(batch))
        return cls(index.to(device, non_blocking=True), *pieces.to(device, non_blocking=True))

    def first(self, rows: int) -> DeviceRows:
        return DeviceRows(self.row_index[:rows], self.piece_slot[:rows], self.piece_begin[:rows], self.piece_end[:rows])

    def fill(self, batch: RowsByAdapter) -> None:
        packed = np.zeros((4, len(self.row_index)), dtype=np.int32)
        pieces = pieces_of(batch)
        packed[0, : len(batch.row_index)] = batch.row_index
        packed[1:, : pieces.shape[1]] = pieces
        sent = torch.from_numpy(packed).to(self.row_index.device, non_blocking=True)
        for to, part in zip((self.row_index, self.piece_slot, self.piece_begin, self.piece_end), sent, strict=True):
            to.copy_(part)


def pieces_of(batch: RowsByAdapter) -> npt.NDArray[np.int32]:
    """(3, pieces): slot, first sorted row and end of each piece."""
    found = [
        (slot, begin, min(begin + _ROWS, stop))
        for slot, start, stop in zip(
            batch.segment_slot.tolist(),
            batch.segment_start[:-1].tolist(),
            batch.segment_start[1:].tolist(),
            strict=True,
        )
        for begin in range(start, stop, _ROWS)
    ]
    return np.array(found, dtype=np.int32).reshape(-1, 3).T.copy()


class TritonLoraKernel:
    """`LoraKernel` for tensors on a GPU."""

    order = TileOrder()

    def __init__(self) -> None:
        self._last: tuple[RowsByAdapter, DeviceRows] | None = None

    def recorded_rows(self, rows: int, device: torch.device) -> RecordedRows | None:
        return DeviceRows.empty(rows, device)

    def add(
        self, x: torch.Tensor, out: torch.Tensor, sites: Sequence[TilesOfSite], batch: RowsByAdapter | RecordedRows
    ) -> None:
        """See `LoraKernel.add`."""
        rows = self._device_rows(batch, x.device)
        count, num_pieces = len(rows.row_index), len(rows.piece_slot)
        in_float32 = _INTERPRETED or x.dtype == torch.float32
        for site in sites:
            width = site.tile_width
            slices = -(-site.in_size // width)
            splits = max(1, min(_MAX_PARTS, slices // _MIN_SLICES))
            parts = torch.empty((splits, count, MAX_RANK), dtype=torch.float32, device=x.device)
            tables = (site.planes, site.first_tile, site.rank_groups, rows.row_index, rows.piece_slot,
                      rows.piece_begin, rows.piece_end, count)  # fmt: skip
            _shrink[(num_pieces, splits)](
                x, parts, *tables, x.stride(0), site.in_size, width, site.tiles_per_plane, splits, MAX_RANK, _ROWS,
                in_float32, num_warps=4,
            )  # fmt: skip
            _expand[(num_pieces, -(-site.out_size // width))](
                parts, out, *tables, out.stride(0), site.in_size, site.out_size, site.out_begin, width,
                site.tiles_per_plane, splits, MAX_RANK, _ROWS, in_float32, num_warps=4,
            )  # fmt: skip

    def add_embedding(
        self, ids: torch.Tensor, out: torch.Tensor, site: TilesOfSite, batch: RowsByAdapter | RecordedRows
    ) -> None:
        """See `LoraKernel.add_embedding`."""
        rows = self._device_rows(batch, ids.device)
        count, num_pieces = len(rows.row_index), len(rows.piece_slot)
        columns = torch.empty((1, count, MAX_RANK), dtype=torch.float32, device=ids.device)
        tables = (site.planes, site.first_tile, site.rank_groups, rows.row_index, rows.piece_slot,
                  rows.piece_begin, rows.piece_end)  # fmt: skip
        width = site.tile_width
        gather_columns[(num_pieces,)](
            ids, columns, out, *tables, site.in_size, width, site.tiles_per_plane, MAX_RANK, _ROWS
        )
        _expand[(num_pieces, -(-site.out_size // width))](
            columns, out, *tables, count, out.stride(0), site.in_size, site.out_size, site.out_begin, width,
            site.tiles_per_plane, 1, MAX_RANK, _ROWS, _INTERPRETED or out.dtype == torch.float32, num_warps=4,
        )  # fmt: skip

    def _device_rows(self, batch: RowsByAdapter | RecordedRows, device: torch.device) -> DeviceRows:
        if isinstance(batch, RecordedRows):
            assert isinstance(batch, DeviceRows)
            return batch
        return self._rows(batch, device)

    def _rows(self, batch: RowsByAdapter, device: torch.device) -> DeviceRows:
        """The batch on the device, sent once for all layers of a step."""
        if self._last is None or self._last[0] is not batch:
            self._last = batch, DeviceRows.of(batch, device)
        return self._last[1]


_INTERPRETED = not isinstance(_shrink, triton.runtime.JITFunction)
"""Triton's interpreter does not support products of bfloat16."""
