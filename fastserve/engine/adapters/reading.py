"""Reads adapters for batches: which layers they change, and their matrices as tiles in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.adapters.manager import AdapterShape
from fastserve.engine.adapters.sites import Site
from fastserve.engine.adapters.tiles import num_rank_groups, num_tiles, pack_tiles
from fastserve.engine.loading.lora.parts import LowRankParts, read_parts
from fastserve.engine.loading.lora.settings import AdapterSettings, read_settings
from fastserve.engine.loading.lora.targets import AdapterTargets
from fastserve.errors import InvalidRequestError, StartupError

MERGE_AT_START = "Serve it merged instead, with its folder as --model-path."


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory."""

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
    ) -> None:
        """`width`: inputs or outputs in a tile."""
        self._sites = sites
        self._targets = targets
        self._dtype = dtype
        self._width = width
        self._tiles_per_block = tiles_per_block
        self._max_rank = max_rank
        self._pins_memory = pins_memory

    def inspect(self, path: str) -> AdapterShape:
        """Read the settings and the shapes. Raises InvalidRequestError for a folder that is no adapter of this model,
        or an adapter that cannot be applied in a batch."""
        changes = self._changes(path)
        count = sum(self._num_tiles(change) for change in changes)
        return AdapterShape(
            rank=max(change.rank for change in changes),
            targets=tuple(sorted({change.site.path.rpartition(".")[2] for change in changes})),
            num_bytes=count * 8 * self._width * self._dtype.itemsize,
            num_blocks=-(-count // self._tiles_per_block),
            stamp=_stamp(Path(path)),
        )

    def read(self, path: str, shape: AdapterShape) -> HostAdapter:
        """Read all of it. Raises InvalidRequestError, also when the files have changed since `shape` was read."""
        if shape.stamp != _stamp(Path(path)):
            raise InvalidRequestError(
                f"The files of the adapter in {path} were changed or removed since it was loaded; load it again, "
                "replacing the one of its name."
            )
        changes = self._changes(path)
        first_tile = np.zeros(len(self._sites), dtype=np.int32)
        rank_groups = np.zeros(len(self._sites), dtype=np.int32)
        count = sum(self._num_tiles(change) for change in changes)
        tiles = torch.empty((count, 8 * self._width), dtype=self._dtype, pin_memory=self._pins_memory)
        at = 0
        for change in changes:
            try:
                a, b = change.parts.a.read().float(), change.parts.b.read().float() * change.scale
            except (StartupError, OSError, ValueError, RuntimeError) as error:
                raise InvalidRequestError(f"{change.parts.a.file} cannot be read: {error}") from error
            packed = pack_tiles(a, b, self._width).to(self._dtype)
            if not bool(packed.isfinite().all()):
                raise InvalidRequestError(
                    f"{change.parts.a.file}: {change.parts.a.name} or {change.parts.b.name} is not finite in the dtype "
                    "of the model. Start with --dtype float32, or train the adapter again."
                )
            tiles[at : at + len(packed)] = packed
            first_tile[change.site.index] = at
            rank_groups[change.site.index] = num_rank_groups(change.rank)
            at += len(packed)
        return HostAdapter(tiles, first_tile, rank_groups)

    def _num_tiles(self, change: _LowRank) -> int:
        return num_tiles(change.rank, change.site.in_size, change.site.out_size, self._width)

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
        needed = ((rank, site.in_size), (site.out_size, rank))
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
