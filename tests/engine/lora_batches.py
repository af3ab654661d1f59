"""Random adapters in tiles at scattered addresses, batches of them, and their products by definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fastserve.engine.adapters.batch import AdapterBatch, SiteTables
from fastserve.engine.adapters.tiles import RANK_GROUP, num_rank_groups, pack_tiles
from fastserve.engine.kernels.lora import TileOrder

NUM_SLOTS = 10


@dataclass
class RandomSite:
    """One site with random adapters of the given ranks, by slot."""

    in_size: int
    out_size: int
    ranks: Mapping[int, int]
    order: TileOrder
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    width: int = 32
    tiles_per_plane: int = 3
    out_begin: int = 0
    scale: float = 0.1
    matrices: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        planes = torch.zeros(NUM_SLOTS, dtype=torch.int64)
        first_tile = torch.zeros(NUM_SLOTS, dtype=torch.int32)
        groups = torch.zeros(NUM_SLOTS, dtype=torch.int32)
        self._alive: list[torch.Tensor] = []
        for slot, rank in self.ranks.items():
            a = (torch.randn(rank, self.in_size) * self.scale).to(self.dtype)
            b = (torch.randn(self.out_size, rank) * self.scale).to(self.dtype)
            self.matrices[slot] = a, b
            before = slot  # tiles of other sites
            size = RANK_GROUP * self.width
            tiles = torch.cat([torch.full((before, size), torch.nan, dtype=self.dtype),
                               pack_tiles(a, b, self.width, self.order)]).to(self.device)  # fmt: skip
            parts = [part.clone() for part in tiles.split(self.tiles_per_plane)]
            addresses = torch.tensor([part.data_ptr() for part in parts], dtype=torch.int64).to(self.device)
            self._alive += [*parts, addresses]
            planes[slot], first_tile[slot], groups[slot] = addresses.data_ptr(), before, num_rank_groups(rank)
        self.tables = SiteTables(
            planes.to(self.device), first_tile.to(self.device), groups.to(self.device), self.in_size, self.out_size,
            self.out_begin, self.width, self.tiles_per_plane,
        )  # fmt: skip

    def product(self, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """Products of the rows' adapters in float64, with x A^T rounded as kernels round it: (rows, out)."""
        out = torch.zeros(len(x), self.out_size, dtype=torch.float64)
        for row, slot in enumerate(slots):
            if slot in self.matrices:
                a, b = (matrix.double() for matrix in self.matrices[slot])
                out[row] = (x[row].cpu().double() @ a.t()).to(self.dtype).double() @ b.t()
        return out

    def embedded(self, ids: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """The same for the tokens `ids` of an embedding."""
        return self.product(F.one_hot(torch.tensor(ids), self.in_size).to(self.dtype), slots)


def batch_of(slots: Sequence[int]) -> AdapterBatch:
    batch = AdapterBatch.of(slots)
    assert batch is not None
    return batch
