# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of kernels are Triton's own values, which have no types that a checker knows.
"""LoRA adapters of an embedding in Triton: the tokens' columns of A. Products with B are those of triton_lora.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_columns(
    ids, columns, out, planes, first_tile, rank_groups, row_index, piece_slot, piece_begin, piece_end,
    IN: tl.constexpr, WIDTH: tl.constexpr, PER_PLANE: tl.constexpr, MAX_RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for each piece: `columns` (rows, MAX_RANK), float32, in sorted rows. `out`: a tensor of the tiles'
    dtype."""
    piece = tl.program_id(0)
    begin = tl.load(piece_begin + piece)
    end = tl.load(piece_end + piece)
    slot = tl.load(piece_slot + piece)
    groups = tl.load(rank_groups + slot)
    if (end > begin) & (groups > 0):
        KIND: tl.constexpr = out.dtype.element_ty
        SLICES: tl.constexpr = (IN + WIDTH - 1) // WIDTH
        at = begin + tl.arange(0, ROWS)
        there = at < end
        token = tl.load(ids + tl.load(row_index + at, mask=there, other=0), mask=there, other=0).to(tl.int32)
        plane = tl.load(planes + slot).to(tl.pointer_type(tl.int64))
        first = tl.load(first_tile + slot)
        rank = tl.arange(0, 8)
        for group in range(groups):
            tile = first + group * SLICES + token // WIDTH
            address = tl.load(plane + tile // PER_PLANE, mask=there, other=0).to(tl.pointer_type(KIND))
            a = address + tile % PER_PLANE * 8 * WIDTH + token % WIDTH
            values = tl.load(a[:, None] + rank[None, :] * WIDTH, mask=there[:, None], other=0.0)
            to = columns + at[:, None].to(tl.int64) * MAX_RANK + group * 8 + rank[None, :]
            tl.store(to, values.to(tl.float32), mask=there[:, None])
