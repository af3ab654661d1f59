"""Adapters on the device, in the same blocks as the KV cache, and products with them.

A block has a *plane* in each layer's keys and one in its values. An adapter's tiles fill the planes of its blocks one
after the other, layer by layer, a fixed number of tiles in each. Where planes are too small or the KV cache is of
another dtype, adapters have memory of their own, divided in the same way, and their blocks only count it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from fastserve.engine.adapters.batch import AdapterBatch, SiteTables
from fastserve.engine.adapters.reading import HostAdapter
from fastserve.engine.adapters.sites import Site
from fastserve.engine.adapters.tiles import PLAIN, RANK_GROUP, TILE_WIDTHS, num_tiles, tile_width, unpack_tiles
from fastserve.engine.attention.backend import KVCache
from fastserve.engine.devices.find import device_of
from fastserve.engine.kernels.lora import RecordedRows


class AdapterMemory:
    def __init__(
        self,
        sites: Mapping[str, Site],
        caches: Sequence[KVCache],
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_slots: int,
        shares_blocks: bool,
        smallest: Callable[[Sequence[int]], list[int]] = list,
        computes: bool = True,
        pads_ranks: bool = False,
    ) -> None:
        """`caches`: the KV cache of each layer. `num_slots`: maximum number of adapters on the device, and one more.
        `shares_blocks`: False for memory of their own. `smallest`: the smallest of each number over all ranks, so that
        all have tiles of one size. `computes`: whether products are added. `pads_ranks`: whether a
        step's products are one padded batch, for measurements."""
        self.sites = tuple(sites.values())
        self.dtype = dtype
        self._device = device
        self.computes = computes
        self._pads_ranks = pads_ranks
        self.kernel = None if pads_ranks else device_of(device).lora_kernel(dtype)
        """None: products are torch's."""
        self.order = PLAIN if self.kernel is None else self.kernel.order
        self._layers = [part.view(len(part), -1) for cache in caches for part in cache]
        """Planes of all blocks: (blocks, elements) for each layer's keys and values."""
        plane_size, block_bytes, has_dtype = smallest(
            [
                min(layer.shape[1] for layer in self._layers),
                sum(layer.shape[1] * layer.dtype.itemsize for layer in self._layers),
                all(layer.dtype == dtype for layer in self._layers),
            ]
        )
        width = tile_width(plane_size)
        self.shares_blocks = shares_blocks and width is not None and bool(has_dtype)
        self.width = width or TILE_WIDTHS[-1]
        self.tile_size = RANK_GROUP * self.width
        """Values of a tile."""
        self.tiles_per_plane: int = max(1, plane_size // self.tile_size)
        self.planes_per_block: int = len(self._layers)
        if not self.shares_blocks:
            plane_bytes = self.tiles_per_plane * self.tile_size * dtype.itemsize
            self.planes_per_block = max(1, block_bytes // plane_bytes)
        self._planes: list[list[torch.Tensor]] = [[] for _ in range(num_slots)]
        """For each slot, the tiles of each plane: tensors of shape (tiles, values of a tile)."""
        self._addresses: list[torch.Tensor | None] = [None] * num_slots
        self._table = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._first_tile = torch.zeros((len(self.sites), num_slots), dtype=torch.int32, device=device)
        self._rank_groups = torch.zeros((len(self.sites), num_slots), dtype=torch.int32, device=device)
        self._of_slot: list[HostAdapterTables | None] = [None] * num_slots
        self.batch: AdapterBatch | RecordedRows | None = None
        """Rows with adapters of the step that is computed."""

    @property
    def num_slots(self) -> int:
        return len(self._planes)

    @property
    def tiles_per_block(self) -> int:
        return self.planes_per_block * self.tiles_per_plane

    def tables(self, site: Site) -> SiteTables:
        return SiteTables(
            self._table, self._first_tile[site.index], self._rank_groups[site.index],
            site.in_size, site.out_size, site.out_begin, self.width, self.tiles_per_plane,
        )  # fmt: skip

    def attach(self) -> None:
        """Have the model's layers add the products of the step's adapters."""
        by_linear: dict[int, list[Site]] = {}
        for site in self.sites:
            by_linear.setdefault(id(site.linear), []).append(site)
        for joined in by_linear.values():
            joined[0].linear.delta = _Delta(self, joined)

    @contextmanager
    def running(self, batch: AdapterBatch | RecordedRows | None) -> Iterator[None]:
        """Within the block, layers compute the step of `batch`."""
        self.batch = batch if self.computes else None
        try:
            yield
        finally:
            self.batch = None

    def place(self, slot: int, host: HostAdapter, block_ids: Sequence[int]) -> None:
        """Copy an adapter to the device, into `block_ids`."""
        per_plane = self.tiles_per_plane
        count = -(-len(host.tiles) // per_plane)
        used = per_plane * self.tile_size
        if self.shares_blocks:
            # A layer's planes of adjacent blocks are adjacent, so most of an adapter is read in long runs.
            in_order = sorted(block_ids)
            planes = [layer[block_id, :used] for layer in self._layers for block_id in in_order][:count]
        else:
            planes = list(torch.zeros((count, used), dtype=self.dtype, device=self._device))
        planes = [plane.view(per_plane, self.tile_size) for plane in planes]
        for plane, tiles in zip(planes, host.tiles.split(per_plane), strict=True):
            plane[: len(tiles)].copy_(tiles, non_blocking=True)
        addresses = torch.tensor([plane.data_ptr() for plane in planes], dtype=torch.int64).to(self._device)
        self._planes[slot], self._addresses[slot] = planes, addresses
        self._of_slot[slot] = HostAdapterTables(host.first_tile.tolist(), host.rank_groups.tolist())
        self._table[slot] = addresses.data_ptr()
        self._first_tile[:, slot] = torch.from_numpy(host.first_tile).to(self._device)
        self._rank_groups[:, slot] = torch.from_numpy(host.rank_groups).to(self._device)

    def clear(self, slot: int) -> None:
        """Forget the adapter of a slot; its blocks may be used for other things."""
        self._rank_groups[:, slot] = 0
        self._table[slot] = 0
        self._planes[slot], self._addresses[slot], self._of_slot[slot] = [], None, None

    def matrices(self, site: Site, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (rank, in) and B (out, rank) of a slot's adapter, or None if it does not change the layer."""
        tables = self._of_slot[slot]
        groups = 0 if tables is None else tables.rank_groups[site.index]
        if tables is None or not groups:
            return None
        first, per_plane = tables.first_tile[site.index], self.tiles_per_plane
        end = first + num_tiles(groups * RANK_GROUP, site.in_size, site.out_size, self.width)
        begin = first // per_plane
        tiles = torch.cat(self._planes[slot][begin : -(-end // per_plane)])
        return unpack_tiles(
            tiles[first - begin * per_plane :], groups, site.in_size, site.out_size, self.width, self.order
        )

    def add(self, site: Site, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the products of the step's adapters: `x` (rows, in), `out` (rows, outputs of the layer)."""
        batch = self.batch
        if not isinstance(batch, AdapterBatch):
            return
        rows = torch.from_numpy(batch.row_index).to(x.device)
        part = out[:, site.out_begin : site.out_begin + site.out_size]
        if self._pads_ranks:
            self._add_padded(site, batch, rows, x, part)
            return
        starts = batch.segment_start.tolist()
        for index, slot in enumerate(batch.segment_slot.tolist()):
            found = self.matrices(site, slot)
            if found is not None:
                a, b = found
                of_adapter = rows[starts[index] : starts[index + 1]]
                # Each row by itself has the same sum in any batch only as far as the library's product has.
                product = x[of_adapter].to(a.dtype) @ a.t() @ b.t()
                part.index_add_(0, of_adapter, product.to(out.dtype))

    def _add_padded(
        self, site: Site, batch: AdapterBatch, rows: torch.Tensor, x: torch.Tensor, part: torch.Tensor
    ) -> None:
        """One batched product, padded to the largest rank and number of rows of an adapter."""
        starts = batch.segment_start.tolist()
        found = [(index, self.matrices(site, slot)) for index, slot in enumerate(batch.segment_slot.tolist())]
        changed = [(rows[starts[index] : starts[index + 1]], *pair) for index, pair in found if pair is not None]
        if not changed:
            return
        pad = torch.nn.utils.rnn.pad_sequence
        xs = pad([x[of_adapter].to(a.dtype) for of_adapter, a, _ in changed], batch_first=True)
        all_a = pad([a for _, a, _ in changed], batch_first=True)
        all_b = pad([b.t() for _, _, b in changed], batch_first=True)
        products = torch.bmm(torch.bmm(xs, all_a.transpose(1, 2)), all_b)
        for (of_adapter, _, _), product in zip(changed, products, strict=True):
            part.index_add_(0, of_adapter, product[: len(of_adapter)].to(part.dtype))


class HostAdapterTables:
    """A slot's tables on the host."""

    __slots__ = ("first_tile", "rank_groups")

    def __init__(self, first_tile: list[int], rank_groups: list[int]) -> None:
        self.first_tile = first_tile
        self.rank_groups = rank_groups


class _Delta:
    """A `Linear.delta`: adds the LoRA products of the batch's adapters to one layer's output."""

    def __init__(self, memory: AdapterMemory, sites: Sequence[Site]) -> None:
        self._memory = memory
        self._sites = sites
        self._tables = [memory.tables(site) for site in sites]

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        memory = self._memory
        if memory.batch is None:
            return
        rows, products = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if memory.kernel is not None:
            memory.kernel.add(rows, products, self._tables, memory.batch)
            return
        for site in self._sites:
            memory.add(site, rows, products)
