"""Adapters on the device, in the same blocks as the KV cache, and products with them.

A block has a *plane* in each layer's keys and one in its values. An adapter's tiles fill the planes of its blocks one
after the other, layer by layer, a fixed number of tiles in each. Where planes are too small or the KV cache is of
another dtype, adapters have memory of their own, divided in the same way, and their blocks only count it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.adapters.batch import NO_SLOT, AdapterBatch, SiteTables
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
        all have tiles of one size, and a kernel or none. `computes`: whether products are added. `pads_ranks`: whether
        a step's products are one padded batch, for measurements."""
        self.sites = tuple(sites.values())
        self.dtype = dtype
        self._device = device
        self.computes = computes
        self._pads_ranks = pads_ranks
        self._layers = [part.view(len(part), -1) for cache in caches for part in cache]
        """Planes of all blocks: (blocks, elements) for each layer's keys and values."""
        kernel = None if pads_ranks else device_of(device).lora_kernel(dtype)
        plane_size, block_bytes, has_dtype, has_kernel = smallest(
            [
                min(layer.shape[1] for layer in self._layers),
                sum(layer.shape[1] * layer.dtype.itemsize for layer in self._layers),
                all(layer.dtype == dtype for layer in self._layers),
                kernel is not None,
            ]
        )
        self.kernel = kernel if has_kernel else None
        """The same on all ranks, whose steps exchange at other places without one. None: products are torch's."""
        self.order = PLAIN if self.kernel is None else self.kernel.order
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
        self._planes: list[_Planes | None] = [None] * num_slots
        self._addresses: list[torch.Tensor | None] = [None] * num_slots
        num_rows = max((site.index + site.num_experts for site in self.sites), default=0)
        max_experts = max((site.num_experts for site in self.sites), default=1)
        self._table = torch.zeros((max_experts, num_slots), dtype=torch.int64, device=device)
        """The same for each expert, whose tables are one table of experts times slots."""
        self._first_tile = torch.zeros((num_rows, num_slots), dtype=torch.int32, device=device)
        self._rank_groups = torch.zeros((num_rows, num_slots), dtype=torch.int32, device=device)
        self._of_slot: list[HostAdapterTables | None] = [None] * num_slots
        self.batch: AdapterBatch | RecordedRows | None = None
        """Rows with adapters of the step that is computed."""
        self.head_batch: AdapterBatch | RecordedRows | None = None
        """The same of the rows that the LM head gets."""

    @property
    def num_slots(self) -> int:
        return len(self._planes)

    @property
    def tiles_per_block(self) -> int:
        return self.planes_per_block * self.tiles_per_plane

    def tables(self, site: Site) -> SiteTables:
        """Those of experts are for the slots of `slots_of_experts`."""
        rows = slice(site.index, site.index + site.num_experts)
        return SiteTables(
            self._table[: site.num_experts].view(-1), self._first_tile[rows].view(-1), self._rank_groups[rows].view(-1),
            site.in_size, site.out_size, site.out_begin, self.width, self.tiles_per_plane,
        )  # fmt: skip

    @contextmanager
    def running(
        self, batch: AdapterBatch | RecordedRows | None, logit_rows: npt.NDArray[np.int64] | None = None
    ) -> Iterator[None]:
        """Within the block, layers compute the step of `batch`. `logit_rows`: those of the LM head; None: all."""
        self.batch = self.head_batch = batch if self.computes else None
        if isinstance(self.batch, AdapterBatch) and logit_rows is not None:
            self.head_batch = self.batch.select(logit_rows)
        try:
            yield
        finally:
            self.batch = self.head_batch = None

    def place(self, slot: int, host: HostAdapter, block_ids: Sequence[int]) -> None:
        """Copy an adapter to the device, into `block_ids`."""
        count = -(-len(host.tiles) // self.tiles_per_plane)
        layers, ids = self._layers, sorted(block_ids)
        if not self.shares_blocks:
            size = self.tiles_per_plane * self.tile_size
            layers, ids = [torch.zeros((count, size), dtype=self.dtype, device=self._device)], list(range(count))
        planes = _Planes(layers, ids, self.tiles_per_plane, self.tile_size)
        planes.fill(host.tiles)
        addresses = torch.from_numpy(planes.addresses()[:count]).to(self._device)
        self._planes[slot], self._addresses[slot] = planes, addresses
        experts = {
            site.index
            for site in self.sites
            if site.kind == "experts" and host.rank_groups[site.index : site.index + site.num_experts].any()
        }
        self._of_slot[slot] = HostAdapterTables(host.first_tile.tolist(), host.rank_groups.tolist(), experts)
        self._table[:, slot] = addresses.data_ptr()
        self._first_tile[:, slot] = torch.from_numpy(host.first_tile).to(self._device)
        self._rank_groups[:, slot] = torch.from_numpy(host.rank_groups).to(self._device)

    def clear(self, slot: int) -> None:
        """Forget the adapter of a slot; its blocks may be used for other things."""
        self._rank_groups[:, slot] = 0
        self._table[:, slot] = 0
        self._planes[slot] = self._addresses[slot] = self._of_slot[slot] = None

    def slots_of_experts(self, slots: npt.NDArray[np.int32], experts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The slots in the tables of experts; NO_SLOT stays."""
        return np.where(slots == NO_SLOT, NO_SLOT, experts * self.num_slots + slots)

    def changes_experts(self, batch: AdapterBatch, sites: Sequence[Site] | None = None) -> bool:
        """Whether an adapter of the batch changes experts. `sites`: these; None: any."""
        changed = [
            tables.experts for slot in batch.segment_slot.tolist() if (tables := self._of_slot[slot]) is not None
        ]
        return any(changed) if sites is None else any(site.index in found for found in changed for site in sites)

    def matrices(self, site: Site, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (rank, in) and B (out, rank) of a slot's adapter, or None if it does not change the layer."""
        expert, slot = divmod(slot, self.num_slots)
        tables, planes, row = self._of_slot[slot], self._planes[slot], site.index + expert
        groups = 0 if tables is None else tables.rank_groups[row]
        if tables is None or planes is None or not groups:
            return None
        first, per_plane = tables.first_tile[row], self.tiles_per_plane
        end = first + num_tiles(groups * RANK_GROUP, site.in_size, site.out_size, self.width)
        begin = first // per_plane
        tiles = torch.cat(planes.tiles(range(begin, -(-end // per_plane))))
        return unpack_tiles(
            tiles[first - begin * per_plane :], groups, site.in_size, site.out_size, self.width, self.order
        )

    def add(self, site: Site, x: torch.Tensor, out: torch.Tensor, batch: AdapterBatch) -> None:
        """Add the products of the adapters of `batch`: `x` (rows, in), `out` (rows, outputs of the layer)."""
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

    def add_embedding(self, site: Site, ids: torch.Tensor, out: torch.Tensor, batch: AdapterBatch) -> None:
        """The same for an embedding: `ids` (rows,), `out` (rows, hidden)."""
        rows = torch.from_numpy(batch.row_index).to(out.device)
        for slot, of_adapter in zip(
            batch.segment_slot.tolist(), rows.split(np.diff(batch.segment_start).tolist()), strict=True
        ):
            found = self.matrices(site, slot)
            if found is not None:
                a, b = found
                out.index_add_(0, of_adapter, (a.t()[ids[of_adapter]] @ b.t()).to(out.dtype))

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


class _Planes:
    """The tiles of an adapter in its blocks: first those of the first layer's planes, then of the second's. A layer's
    planes of adjacent blocks are adjacent, so most of an adapter is read in long runs."""

    def __init__(
        self, layers: Sequence[torch.Tensor], block_ids: list[int], tiles_per_plane: int, tile_size: int
    ) -> None:
        """`layers`: planes of all blocks, (blocks, elements); `block_ids`: in ascending order."""
        self._layers = [layer[:, : tiles_per_plane * tile_size] for layer in layers]
        self._block_ids = block_ids
        self._shape = (tiles_per_plane, tile_size)

    def fill(self, tiles: torch.Tensor) -> None:
        """Copy `tiles`, with one operation for a layer: this is done between two steps."""
        per_plane = self._shape[0]
        device = self._layers[0].device
        ids = torch.tensor(self._block_ids).to(device)
        for layer, part in zip(self._layers, tiles.split(per_plane * len(ids)), strict=False):
            num_whole = len(part) // per_plane
            whole, rest = part[: num_whole * per_plane], part[num_whole * per_plane :]
            layer.index_copy_(0, ids[:num_whole], whole.to(device, non_blocking=True).view(num_whole, layer.shape[1]))
            if len(rest):
                layer[self._block_ids[num_whole]].view(self._shape)[: len(rest)].copy_(rest, non_blocking=True)

    def tiles(self, planes: range) -> list[torch.Tensor]:
        """The tiles in each of these planes: (tiles, values of a tile)."""
        count = len(self._block_ids)
        return [self._layers[at // count][self._block_ids[at % count]].view(self._shape) for at in planes]

    def addresses(self) -> npt.NDArray[np.int64]:
        """Address of each plane."""
        begins = np.array([layer.data_ptr() for layer in self._layers], dtype=np.int64)
        sizes = np.array([layer.stride(0) * layer.element_size() for layer in self._layers], dtype=np.int64)
        return (begins[:, None] + np.array(self._block_ids, dtype=np.int64) * sizes[:, None]).reshape(-1)


@dataclass(frozen=True, slots=True)
class HostAdapterTables:
    """A slot's tables on the host."""

    first_tile: list[int]
    rank_groups: list[int]
    experts: set[int]
    """`index` of the sites of experts that the adapter changes."""
