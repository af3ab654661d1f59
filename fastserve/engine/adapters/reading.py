"""Reads adapters for batches: which layers they change, and their matrices as tiles in host memory."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.adapters.manager import AdapterShape
from fastserve.engine.adapters.sites import Site
from fastserve.engine.adapters.tiles import PLAIN, RANK_GROUP, num_rank_groups, num_tiles, pack_tiles
from fastserve.engine.kernels.lora import TileOrder
from fastserve.engine.loading.checkpoint import StoredTensor, read_ahead, read_header, read_stacked
from fastserve.engine.loading.lora.parts import LowRankParts, read_parts
from fastserve.engine.loading.lora.settings import AdapterSettings, read_settings
from fastserve.engine.loading.lora.targets import AdapterTargets
from fastserve.engine.loading.sharding import Shard
from fastserve.engine.loading.tensor_shards import take
from fastserve.errors import InvalidRequestError, StartupError

_COMPARED_ROWS = 4096
_GROUP_VALUES = 1 << 20
"""Values of matrices that are packed at once."""
_MAX_LAYOUTS = 16
MERGE_AT_START = "Serve it merged instead, with its folder as --model-path."


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """One rank's part of an adapter in host memory."""

    tiles: torch.Tensor
    """(tiles, values of a tile)"""
    first_tile: npt.NDArray[np.int32]
    """(sites,)"""
    rank_groups: npt.NDArray[np.int32]
    """(sites,) 0: it does not change the layer"""


@dataclass(frozen=True, slots=True)
class _LowRank:
    site: Site
    parts: LowRankParts
    rank: int
    scale: float
    experts: range
    """The experts that it changes; 0 alone for other layers."""


@dataclass(frozen=True, slots=True)
class _Alike:
    """Changes that are read and packed by the same operations, and small enough to be held beside their tiles. Their
    matrices are counted in order: those of all experts of the first change, of the second, ..."""

    changes: list[_LowRank]
    scales: torch.Tensor
    """(changes, 1, 1)"""
    is_scaled: bool
    """Whether any scale is not 1."""
    is_whole: bool
    """Whether ranks have all of a matrix or nothing of it."""
    own: list[list[int]]
    """The matrices that each rank has, whole or in part."""
    own_tiles: list[torch.Tensor]
    """Places of their tiles in each rank's part."""

    def read(self, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """A (matrices, rank, in), and B (matrices, out, rank) with the scale."""
        rank, count = self.changes[0].rank, len(self.changes[0].experts)
        # PEFT has one matrix of all experts: in A the expert is the first part of an index of ranks, in B the last.
        a = read_stacked([change.parts.a for change in self.changes], file)
        b = read_stacked([change.parts.b for change in self.changes], file)
        if self.is_scaled:
            b = b.float() * self.scales
        return (
            a.unflatten(1, (count, rank)).flatten(0, 1),
            b.unflatten(2, (rank, count)).movedim(3, 1).flatten(0, 1),
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    """The place of each matrix in an adapter's file and in its tiles."""

    file_name: str
    changes: list[_LowRank]
    whole: list[tuple[Site, StoredTensor]]
    """The base model's embedding and LM head where the file has them too."""
    alike: list[_Alike]
    num_tiles: list[int]
    """For each rank; so are the tables."""
    first_tile: list[npt.NDArray[np.int32]]
    rank_groups: list[npt.NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class _Place:
    """The layer that a low-rank change is for."""

    path: str
    """Path of the layer; a key of `AdapterTargets.sizes` if adapters can change it."""
    names: tuple[str, ...]
    """Names by which adapter_config.json may have settings of it."""
    expert: int | None
    """None: all, or no experts."""
    is_parameter: bool
    """Whether PEFT found it by `target_parameters`."""


class AdapterReader:
    def __init__(
        self,
        sites: Mapping[str, Site],
        targets: AdapterTargets,
        dtype: torch.dtype,
        *,
        width: int,
        tiles_per_block: int,
        max_rank: int,
        pins_memory: bool,
        order: TileOrder = PLAIN,
    ) -> None:
        """`width`: inputs or outputs in a tile; `order`: of the values in one."""
        self._sites = sites
        self._targets = targets
        self._dtype = dtype
        self._width = width
        self._tile_size = RANK_GROUP * width
        self._tiles_per_block = tiles_per_block
        self._max_rank = max_rank
        self._pins_memory = pins_memory
        self._order = order
        self._layouts: dict[bytes, _Layout] = {}
        self._lock = threading.Lock()

    def inspect(self, path: str) -> AdapterShape:
        """Read the settings and the shapes. Raises InvalidRequestError for a folder that is no adapter of this model,
        or an adapter that cannot be applied in a batch."""
        layout = self._layout(Path(path))
        for site, stored in layout.whole:
            self._require_unchanged(site, stored)
        count = max(layout.num_tiles)
        return AdapterShape(
            rank=max(change.rank for change in layout.changes),
            targets=tuple(sorted({change.site.path.rpartition(".")[2] for change in layout.changes})),
            num_bytes=count * self._tile_size * self._dtype.itemsize,
            num_blocks=-(-count // self._tiles_per_block),
            stamp=_stamp(Path(path)),
        )

    def read(self, path: str, shape: AdapterShape) -> list[HostAdapter]:
        """Read all of it: the part of each rank. Raises InvalidRequestError, also when the files have changed since
        `shape` was read."""
        if shape.stamp != _stamp(Path(path)):
            raise InvalidRequestError(
                f"The files of the adapter in {path} were changed or removed since it was loaded; load it again, "
                "replacing the one of its name."
            )
        layout = self._layout(Path(path))
        file = Path(path) / layout.file_name
        read_ahead(file)
        parts = [
            HostAdapter(self._empty(count), first_tile, rank_groups)
            for count, first_tile, rank_groups in zip(
                layout.num_tiles, layout.first_tile, layout.rank_groups, strict=True
            )
        ]
        for alike in layout.alike:
            try:
                a, b = alike.read(file)
            except (StartupError, OSError, ValueError, RuntimeError) as error:
                raise InvalidRequestError(f"{file} cannot be read: {error}") from error
            for rank, part in enumerate(parts):
                if alike.own[rank]:
                    own = self._part(alike, rank, a, b)
                    packed = pack_tiles(*own, self._width, self._order)
                    part.tiles.index_copy_(0, alike.own_tiles[rank], packed.flatten(0, 1))
        for rank, part in enumerate(parts):
            self._require_finite(file, layout, rank, part)
        return parts

    def _part(self, alike: _Alike, rank: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's part of the matrices, in the dtype of the model."""
        own, count = alike.own[rank], len(alike.changes[0].experts)
        if not alike.is_whole:
            of_rank = [
                self._targets.part(alike.changes[place // count].site.path, rank, a[place], b[place]) for place in own
            ]
            a, b = (torch.stack(found) for found in zip(*of_rank, strict=True))
        elif len(own) < len(a):
            a, b = a[own], b[own]
        return a.to(self._dtype), b.to(self._dtype)

    def _layout(self, folder: Path) -> _Layout:
        """Many adapters are trained with equal settings: names and settings are checked once for all of them."""
        key = _layout_key(folder)
        with self._lock:
            found = None if key is None else self._layouts.get(key)
        if found is not None:
            return found
        layout = self._make_layout(*self._changes(folder))
        if key is not None and not layout.whole:
            with self._lock:
                self._layouts[key] = layout
                while len(self._layouts) > _MAX_LAYOUTS:
                    del self._layouts[next(iter(self._layouts))]
        return layout

    def _make_layout(self, changes: list[_LowRank], whole: list[tuple[Site, StoredTensor]]) -> _Layout:
        ranks = range(self._targets.num_ranks)
        rows = sum(site.num_experts for site in self._sites.values())
        first_tile, rank_groups = ([np.zeros(rows, dtype=np.int32) for _ in ranks] for _ in range(2))
        num_tiles = [0 for _ in ranks]
        for rank in ranks:
            for change in changes:
                for expert in self._own_experts(change, rank):
                    first_tile[rank][change.site.index + expert] = num_tiles[rank]
                    rank_groups[rank][change.site.index + expert] = num_rank_groups(change.rank)
                    num_tiles[rank] += self._num_tiles(change, rank)
        alike = [self._make_alike(group, first_tile) for group in self._groups(changes)]
        return _Layout(changes[0].parts.a.file.name, changes, whole, alike, num_tiles, first_tile, rank_groups)

    def _make_alike(self, changes: list[_LowRank], first_tile: list[npt.NDArray[np.int32]]) -> _Alike:
        own: list[list[int]] = []
        own_tiles = []
        for rank, begins in enumerate(first_tile):
            has = [
                (place, begins[change.site.index + expert])
                for place, (change, expert) in enumerate(
                    (change, expert) for change in changes for expert in change.experts
                )
                if expert in self._own_experts(change, rank)
            ]
            own.append([place for place, _ in has])
            count = self._num_tiles(changes[0], rank)
            begin = torch.tensor([begin for _, begin in has], dtype=torch.int64)
            own_tiles.append((begin[:, None] + torch.arange(count)).flatten())
        scales = [change.scale for change in changes]
        return _Alike(
            changes,
            torch.tensor(scales).view(-1, 1, 1),
            any(scale != 1 for scale in scales),
            all(self._targets.is_whole(change.site.path) for change in changes),
            own,
            own_tiles,
        )

    def _own_experts(self, change: _LowRank, rank: int) -> range:
        """Those that a rank has, of the experts that are changed."""
        if change.site.kind != "experts":
            return change.experts
        own = self._targets.own_experts(change.site.path, rank)
        return range(max(own.start, change.experts.start), min(own.stop, change.experts.stop))

    def _groups(self, changes: Sequence[_LowRank]) -> list[list[_LowRank]]:
        groups: dict[Any, list[list[_LowRank]]] = {}
        for change in changes:
            a, b = change.parts.a, change.parts.b
            sizes = [self._targets.part_sizes(change.site.path, rank) for rank in range(self._targets.num_ranks)]
            key = (change.rank, a.dtype, b.dtype, a.shape, b.shape, *sizes)
            last = groups.setdefault(key, [[]])
            if len(last[-1]) >= max(1, _GROUP_VALUES // (math.prod(a.shape) + math.prod(b.shape))):
                last.append([])
            last[-1].append(change)
        return [group for split in groups.values() for group in split]

    def _require_finite(self, file: Path, layout: _Layout, rank: int, part: HostAdapter) -> None:
        if _is_finite(part.tiles):
            return
        for change in layout.changes:
            own = self._own_experts(change, rank)
            if not own:
                continue
            begin = part.first_tile[change.site.index + own.start]
            if not _is_finite(part.tiles[begin : begin + self._num_tiles(change, rank) * len(own)]):
                a, b = change.parts.a, change.parts.b
                raise InvalidRequestError(
                    f"{file}: {a.name} or {b.name} is not finite in the dtype of the model. Start with --dtype "
                    "float32, or train the adapter again."
                )

    def _empty(self, count: int) -> torch.Tensor:
        return torch.empty((count, self._tile_size), dtype=self._dtype, pin_memory=self._pins_memory)

    def _num_tiles(self, change: _LowRank, rank: int) -> int:
        """Number of tiles of a change; of one expert, where the layer has experts."""
        return num_tiles(change.rank, *self._targets.part_sizes(change.site.path, rank), self._width)

    def _changes(self, folder: Path) -> tuple[list[_LowRank], list[tuple[Site, StoredTensor]]]:
        """The low-rank changes in the order of the sites, and the base model's embedding and LM head where the file has
        them too."""
        try:
            settings = read_settings(folder / "adapter_config.json")
            parts = read_parts(folder)
        except StartupError as error:
            raise InvalidRequestError(error.message) from error
        _refuse_variants(folder, settings)
        whole = {name: self._vocabulary_site(name) for name in parts.whole.keys() - parts.saved}
        for names, field in (
            (parts.rows, "trainable_token_indices"),
            (parts.saved, "modules_to_save"),
            ([name for name, site in whole.items() if site is None], "whole weights"),
        ):
            for name in names:
                raise InvalidRequestError(
                    f"The adapter in {folder} replaces {name} ({field}), which cannot be done in a batch. "
                    f"{MERGE_AT_START}"
                )
        found: dict[int, _LowRank] = {}
        for low_rank in parts.low_rank:
            change = self._change(folder, settings, low_rank)
            for expert in change.experts:
                other = found.setdefault(change.site.index + expert, change)
                if other is not change:
                    raise InvalidRequestError(
                        f"{low_rank.a.file}: {other.parts.a.name} and {low_rank.a.name} both change "
                        f"{change.site.path}. Save the adapter again."
                    )
        if not found:
            raise InvalidRequestError(f"The adapter in {folder} changes no layer.")
        return (
            list({id(found[row]): found[row] for row in sorted(found)}.values()),
            [(site, parts.whole[name]) for name, site in whole.items() if site is not None],
        )

    def _vocabulary_site(self, own_name: str) -> Site | None:
        """The site of a weight that is that of the embedding or the LM head."""
        path = (self._targets.names.find(own_name) or "").removesuffix(".weight")
        return self._sites.get(path) if path in (self._targets.embedding, self._targets.head) else None

    def _require_unchanged(self, site: Site, stored: StoredTensor) -> None:
        """PEFT saves the base model's embedding and LM head beside the changes of them (save_embedding_layers). Raises
        InvalidRequestError where they are not those of this model, as far as this rank has them."""
        begin, end = self._targets.rows(site.path, 0)
        in_size, out_size = self._targets.sizes[site.path]
        is_equal = stored.shape == (
            (in_size, out_size) if site.path == self._targets.embedding else (out_size, in_size)
        )
        for first in range(begin, end, _COMPARED_ROWS) if is_equal else ():
            last = min(first + _COMPARED_ROWS, end)
            shard = Shard(stored.shape, 0, ((first, last),))
            found = take(shard, stored.read()) if stored.read_shard is None else stored.read_shard(shard)
            base = site.weight_rows(first - begin, last - begin)
            is_equal = is_equal and torch.equal(found.to(base.dtype), base)
        if not is_equal:
            raise InvalidRequestError(
                f"{stored.file}: {stored.name} differs from {site.path} of the base model, and cannot be replaced in a "
                f"batch. If it is that of the base model before it was quantized, save the adapter again with "
                f"save_embedding_layers=False. {MERGE_AT_START}"
            )

    def _change(self, folder: Path, settings: AdapterSettings, parts: LowRankParts) -> _LowRank:
        a, b = parts.a, parts.b
        place = self._place(settings, parts)
        site = None if place is None else self._sites.get(place.path)
        if place is None or (site is not None and (place.expert or 0) >= site.num_experts):
            raise InvalidRequestError(
                f"The adapter in {folder} changes {parts.path}, which the base model does not have."
            )
        path = place.path
        if site is None or (place.is_parameter and self._targets.is_transposed(path)):
            raise InvalidRequestError(
                f"The adapter in {folder} changes {path}, which is no layer that adapters of a batch can change"
                f"{' by target_parameters' if place.is_parameter else ''}. {MERGE_AT_START}"
            )
        if parts.of_embedding != (path == self._targets.embedding):
            raise InvalidRequestError(
                f"{a.file} has {a.name}, and {path} of the base model is {'no' if parts.of_embedding else 'an'} "
                "embedding. Save the adapter again."
            )
        self._refuse_twice_tied(folder, settings, path)
        others = parts.tensors.keys() - {"lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"}
        for other in sorted(others):
            raise InvalidRequestError(
                f"{a.file} has a {other} for {parts.path}, which cannot be applied in a batch. {MERGE_AT_START}"
            )
        if not place.is_parameter and not any(settings.targets(one) for one in place.names):
            raise InvalidRequestError(
                f"{a.file} has {a.name}, and by its adapter_config.json the adapter is not for {parts.path} "
                "(target_modules, exclude_modules, layers_to_transform). Save the adapter again."
            )
        experts = range(site.num_experts) if place.expert is None else range(place.expert, place.expert + 1)
        rank = settings.rank_of(place.names)
        in_size, out_size = self._targets.sizes[path]
        needed = ((rank * len(experts), in_size), (out_size, rank * len(experts)))
        if (tuple(a.shape), tuple(b.shape)) != needed:
            raise InvalidRequestError(
                f"{a.file}: {a.name} and {b.name} have the shapes {a.shape} and {b.shape}; with the rank of "
                f"adapter_config.json, {rank}, the base model needs {needed[0]} and {needed[1]}."
            )
        if rank > self._max_rank:
            raise InvalidRequestError(
                f"The adapter in {folder} has rank {rank} for {parts.path}, and at most {self._max_rank} is served; "
                "raise --max-lora-rank."
            )
        return _LowRank(site, parts, rank, settings.scale_of(place.names, rank) * site.scale, experts)

    def _refuse_twice_tied(self, folder: Path, settings: AdapterSettings, path: str) -> None:
        if settings.ensure_weight_tying and path in (self._targets.embedding, self._targets.head):
            raise InvalidRequestError(
                f"The adapter in {folder} changes {path} with ensure_weight_tying, which PEFT applies in one way in "
                "training and in another when it merges. Train it without."
            )

    def _place(self, settings: AdapterSettings, parts: LowRankParts) -> _Place | None:
        """None: the base model has no such layer."""
        names = self._targets.names
        parameters = names.targeted_parameters(parts.path, settings.target_parameters)
        if parts.nesting < len(parameters):
            name = parameters[-1 - parts.nesting]
            return _Place(name.removesuffix(".weight"), (f"{parts.path}.{name.rpartition('.')[2]}", name), None, True)
        weight = names.find(f"{parts.path}.weight")
        if weight is not None and parts.nesting == 0:
            path = weight.removesuffix(".weight")
            return _Place(path, (parts.path, path), None, False)
        found = names.find_expert(parts.path) if parts.nesting == 0 else None
        if found is None:
            return None
        module, _, name = found.weight.rpartition(".")
        if found.num_parts > 1:
            name = next(
                (
                    path.rpartition(".")[2]
                    for path, target in self._targets.experts.items()
                    if (target.module, target.name, target.part) == (module, name, found.part)
                ),
                "",
            )
        return _Place(f"{module}.{name}", (parts.path,), found.expert, False)


def _is_finite(values: torch.Tensor) -> bool:
    """By the least and greatest value, which a NaN would be: one pass without temporary tensors."""
    return all(bool(bound.isfinite()) for bound in torch.aminmax(values))


def _stamp(folder: Path) -> tuple[int, ...]:
    """Numbers that change with the files of an adapter."""
    found = []
    for file in sorted(folder.glob("adapter_*")):
        stat = file.stat()
        found += [stat.st_ino, stat.st_size, stat.st_mtime_ns]
    return tuple(found)


def _layout_key(folder: Path) -> bytes | None:
    """Equal for folders whose layouts are equal. None: not known without reading all."""
    file = folder / "adapter_model.safetensors"
    try:
        parts = ((folder / "adapter_config.json").read_bytes(), read_header(file))
        size = file.stat().st_size
    except (OSError, ValueError):
        return None
    return hashlib.blake2b(b"%d:%d:" % (size, len(parts[0])) + b"".join(parts)).digest()


def _refuse_variants(folder: Path, settings: AdapterSettings) -> None:
    for field, is_set in (
        ("use_dora", settings.use_dora),
        ("lora_bias", settings.lora_bias),
        ("bias", settings.bias != "none"),
        ("use_bdlora", settings.use_bdlora is not None),
        ("kasa_config", settings.kasa_config is not None),
        ("init_lora_weights", settings.changed_base is not None),
        ("modules_to_save", bool(settings.modules_to_save)),
        ("trainable_token_indices", bool(settings.trainable_token_indices)),
    ):
        if is_set:
            raise InvalidRequestError(
                f"The adapter in {folder} has {field} = {getattr(settings, field)!r}, which cannot be applied in a "
                f"batch. {MERGE_AT_START}"
            )
