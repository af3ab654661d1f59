"""Low-rank matrices as tiles of RANK_GROUP ranks and a slice of the inputs or outputs, padded with zeros.

The order of a tile's values is what the device's kernel reads fastest; by default it is RANK_GROUP rows of `width`
values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastserve.engine.kernels.lora import TileOrder

RANK_GROUP = 8
TILE_WIDTHS = (128, 64, 32, 16)
PLAIN = TileOrder()


def tile_width(plane_elements: int) -> int | None:
    """The largest width whose tiles fit a plane of a KV block of so many elements, or None."""
    return next((width for width in TILE_WIDTHS if RANK_GROUP * width <= plane_elements), None)


def num_rank_groups(rank: int) -> int:
    return -(-rank // RANK_GROUP)


def num_tiles(rank: int, in_size: int, out_size: int, width: int) -> int:
    """Number of tiles of A and B together."""
    return num_rank_groups(rank) * (-(-in_size // width) + -(-out_size // width))


def pack_tiles(a: torch.Tensor, b: torch.Tensor, width: int, order: TileOrder = PLAIN) -> torch.Tensor:
    """`a` (..., rank, in), `b` (..., out, rank) with the adapter's scale -> (..., tiles, RANK_GROUP * width): first
    those of A, for each rank group one for each slice of the inputs, then those of B in the same way."""
    # Each value is copied once into its tile, and values that stay adjacent as one element.
    chunk, lanes = order.chunk or width, order.lanes or width
    pad_a, pad_b = (-a.shape[-1] % width, -a.shape[-2] % RANK_GROUP), (-b.shape[-1] % RANK_GROUP, -b.shape[-2] % width)
    padded_a = F.pad(a, (0, pad_a[0], 0, pad_a[1])) if any(pad_a) else a.contiguous()
    padded_b = F.pad(b, (0, pad_b[0], 0, pad_b[1])) if any(pad_b) else b.contiguous()
    split_a = padded_a.unflatten(-1, (-1, width // chunk, chunk)).unflatten(-4, (-1, RANK_GROUP))
    of_a = split_a.movedim(-4, -2)  # (..., groups, slices, chunks, ranks, chunk)
    split_b = _joined(padded_b, order.pair)
    split_b = split_b.unflatten(-1, (-1, RANK_GROUP // order.pair)).unflatten(-3, (-1, width // lanes, lanes))
    of_b = split_b.movedim(-2, -5).movedim(-1, -2)  # (..., groups, slices, lane blocks, pairs, lanes)
    tiles_of_a = of_a.flatten(-3).flatten(-3, -2)
    tiles_of_b = of_b.flatten(-3).flatten(-3, -2).view(a.dtype)
    return torch.cat([tiles_of_a, tiles_of_b], dim=-2)


def unpack_tiles(
    tiles: torch.Tensor, rank_groups: int, in_size: int, out_size: int, width: int, order: TileOrder = PLAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_tiles`, with the rank padded to whole groups: A (rank, in) and B (out, rank)."""
    num_in = rank_groups * -(-in_size // width)
    num_out = rank_groups * -(-out_size // width)
    tiles_of_a, tiles_of_b = tiles[:num_in], tiles[num_in : num_in + num_out]
    if order.chunk is not None:
        tiles_of_a = tiles_of_a.view(-1, width // order.chunk, RANK_GROUP, order.chunk).transpose(1, 2)
    if order.lanes is not None:
        split = tiles_of_b.view(-1, width // order.lanes, RANK_GROUP // order.pair, order.lanes, order.pair)
        tiles_of_b = split.permute(0, 2, 4, 1, 3)
    a = _matrix(tiles_of_a, rank_groups, width)[:, :in_size]
    b = _matrix(tiles_of_b, rank_groups, width)[:, :out_size]
    return a, b.t()


def _joined(values: torch.Tensor, count: int) -> torch.Tensor:
    """Each `count` adjacent values as one element, whose bits are theirs."""
    if count == 1:
        return values
    return values.view({4: torch.int32, 8: torch.int64}[count * values.itemsize])


def _matrix(tiles: torch.Tensor, rank_groups: int, width: int) -> torch.Tensor:
    groups = tiles.reshape(rank_groups, -1, RANK_GROUP, width).transpose(1, 2)
    return groups.reshape(rank_groups * RANK_GROUP, -1)
