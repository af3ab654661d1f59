"""Reads adapters for batches: which layers they change, and their matrices as tiles in host memory."""

from __future__ import annotations

import math
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
from fastserve.engine.loading.lora.parts import LowRankParts, read_parts
from fastserve.engine.loading.lora.settings import AdapterSettings, read_settings
from fastserve.engine.loading.lora.targets import AdapterTargets
from fastserve.errors import InvalidRequestError, StartupError

_GROUP_VALUES = 1 << 20
"""Values of matrices that are packed at once."""
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
        self._tiles_per_block = tiles_per_block
        self._max_rank = max_rank
        self._pins_memory = pins_memory
        self._order = order

    def inspect(self, path: str) -> AdapterShape:
        """Read the settings and the shapes. Raises InvalidRequestError for a folder that is no adapter of this model,
        or an adapter that cannot be applied in a batch."""
        changes = self._changes(path)
        count = max(self._count(changes, rank) for rank in range(self._targets.num_ranks))
        return AdapterShape(
            rank=max(change.rank for change in changes),
            targets=tuple(sorted({change.site.path.rpartition(".")[2] for change in changes})),
            num_bytes=count * RANK_GROUP * self._width * self._dtype.itemsize,
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
        changes = self._changes(path)
        parts = [self._empty(changes, rank) for rank in range(self._targets.num_ranks)]
        for rank, part in enumerate(parts):
            begin = 0
            for change in changes:
                part.first_tile[change.site.index] = begin
                part.rank_groups[change.site.index] = num_rank_groups(change.rank)
                begin += self._num_tiles(change, rank)
        for alike in self._alike(changes):
            try:
                pairs = [(change.parts.a.read(), change.parts.b.read().float() * change.scale) for change in alike]
            except (StartupError, OSError, ValueError, RuntimeError) as error:
                raise InvalidRequestError(f"{alike[0].parts.a.file} cannot be read: {error}") from error
            for rank, part in enumerate(parts):
                of_rank = [
                    self._targets.part(change.site.path, rank, *pair) for change, pair in zip(alike, pairs, strict=True)
                ]
                a, b = (torch.stack(matrices).to(self._dtype) for matrices in zip(*of_rank, strict=True))
                packed = pack_tiles(a, b, self._width, self._order)
                for change, tiles in zip(alike, packed, strict=True):
                    begin = part.first_tile[change.site.index]
                    part.tiles[begin : begin + len(tiles)] = tiles
        for rank, part in enumerate(parts):
            self._require_finite(changes, rank, part)
        return parts

    def _alike(self, changes: Sequence[_LowRank]) -> list[list[_LowRank]]:
        """The changes in groups that can be packed by the same operations, and that are small enough to be held beside
        their tiles."""
        groups: dict[Any, list[list[_LowRank]]] = {}
        for change in changes:
            a, b = change.parts.a, change.parts.b
            sizes = [self._targets.part_sizes(change.site.path, rank) for rank in range(self._targets.num_ranks)]
            key = (change.rank, a.dtype, a.shape, b.shape, *sizes)
            last = groups.setdefault(key, [[]])
            if len(last[-1]) >= max(1, _GROUP_VALUES // (math.prod(a.shape) + math.prod(b.shape))):
                last.append([])
            last[-1].append(change)
        return [group for split in groups.values() for group in split]

    def _require_finite(self, changes: Sequence[_LowRank], rank: int, part: HostAdapter) -> None:
        if _is_finite(part.tiles):
            return
        for change in changes:
            begin = part.first_tile[change.site.index]
            if not _is_finite(part.tiles[begin : begin + self._num_tiles(change, rank)]):
                a, b = change.parts.a, change.parts.b
                raise InvalidRequestError(
                    f"{a.file}: {a.name} or {b.name} is not finite in the dtype of the model. Start with --dtype "
                    "float32, or train the adapter again."
                )

    def _empty(self, changes: Sequence[_LowRank], rank: int) -> HostAdapter:
        tables = (np.zeros(len(self._sites), dtype=np.int32) for _ in range(2))
        shape = (self._count(changes, rank), RANK_GROUP * self._width)
        return HostAdapter(torch.empty(shape, dtype=self._dtype, pin_memory=self._pins_memory), *tables)

    def _count(self, changes: Sequence[_LowRank], rank: int) -> int:
        """Number of tiles of a rank's part."""
        return sum(self._num_tiles(change, rank) for change in changes)

    def _num_tiles(self, change: _LowRank, rank: int) -> int:
        return num_tiles(change.rank, *self._targets.part_sizes(change.site.path, rank), self._width)

    def _changes(self, path: str) -> list[_LowRank]:
        """In the order of the sites."""
        folder = Path(path)
        try:
            settings = read_settings(folder / "adapter_config.json")
            parts = read_parts(folder)
        except StartupError as error:
            raise InvalidRequestError(error.message) from error
        _refuse_variants(folder, settings)
        for names, field in (
            (parts.rows, "trainable_token_indices"),
            (parts.saved, "modules_to_save"),
            (parts.whole, "whole weights"),
        ):
            for name in names:
                raise InvalidRequestError(
                    f"The adapter in {folder} replaces {name} ({field}), which cannot be done in a batch. "
                    f"{MERGE_AT_START}"
                )
        found: dict[int, _LowRank] = {}
        for low_rank in parts.low_rank:
            change = self._change(folder, settings, low_rank)
            other = found.setdefault(change.site.index, change)
            if other is not change:
                raise InvalidRequestError(
                    f"{low_rank.a.file}: {other.parts.a.name} and {low_rank.a.name} both change {change.site.path}. "
                    "Save the adapter again."
                )
        if not found:
            raise InvalidRequestError(f"The adapter in {folder} changes no layer.")
        return [found[index] for index in sorted(found)]

    def _change(self, folder: Path, settings: AdapterSettings, parts: LowRankParts) -> _LowRank:
        a, b = parts.a, parts.b
        name = self._targets.names.find(f"{parts.path}.weight") if parts.nesting == 0 else None
        path = name.removesuffix(".weight") if name is not None else parts.path
        site = self._sites.get(path)
        if site is None:
            if name is None and not self._may_be_an_expert(parts.path):
                raise InvalidRequestError(
                    f"The adapter in {folder} changes {parts.path}, which the base model does not have."
                )
            raise InvalidRequestError(
                f"The adapter in {folder} changes {parts.path}, which is no linear layer that adapters of a batch can "
                f"change (embeddings, LM head, experts). {MERGE_AT_START}"
            )
        others = parts.tensors.keys() - {"lora_A.weight", "lora_B.weight"}
        for other in sorted(others):
            raise InvalidRequestError(
                f"{a.file} has a {other} for {parts.path}, which cannot be applied in a batch. {MERGE_AT_START}"
            )
        names = (parts.path, path)
        if not any(settings.targets(one) for one in names):
            raise InvalidRequestError(
                f"{a.file} has {a.name}, and by its adapter_config.json the adapter is not for {parts.path} "
                "(target_modules, exclude_modules, layers_to_transform). Save the adapter again."
            )
        rank = settings.rank_of(names)
        in_size, out_size = self._targets.sizes[path]
        needed = ((rank, in_size), (out_size, rank))
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
        return _LowRank(site, parts, rank, settings.scale_of(names, rank))

    def _may_be_an_expert(self, path: str) -> bool:
        return ".experts." in f".{path}."


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


def _refuse_variants(folder: Path, settings: AdapterSettings) -> None:
    for field, is_set in (
        ("use_dora", settings.use_dora),
        ("lora_bias", settings.lora_bias),
        ("bias", settings.bias != "none"),
        ("use_bdlora", settings.use_bdlora is not None),
        ("kasa_config", settings.kasa_config is not None),
        ("init_lora_weights", settings.changed_base is not None),
        ("target_parameters", bool(settings.target_parameters)),
        ("modules_to_save", bool(settings.modules_to_save)),
        ("trainable_token_indices", bool(settings.trainable_token_indices)),
    ):
        if is_set:
            raise InvalidRequestError(
                f"The adapter in {folder} has {field} = {getattr(settings, field)!r}, which cannot be applied in a "
                f"batch. {MERGE_AT_START}"
            )
