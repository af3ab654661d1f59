"""The contract of kernels for LoRA adapters of a batch, and the binding of lora.h.

An adapter's low-rank matrices are tiles (adapters/tiles.py). Kernels find them by tables that change between
steps.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.kernels.packed_linear import LANES


@dataclass(frozen=True, slots=True)
class TileOrder:
    """Order of the values in a tile of RANK_GROUP ranks and a slice of the inputs or outputs."""

    chunk: int | None = None
    """A: [slice / chunk][ranks][chunk]; None: [ranks][slice]"""
    lanes: int | None = None
    """B: [slice / lanes][ranks / pair][lanes][pair]; None: [ranks][slice]"""
    pair: int = 1


class RowsByAdapter(Protocol):
    """The rows of a step that have an adapter (AdapterBatch)."""

    @property
    def row_index(self) -> npt.NDArray[np.int32]: ...
    @property
    def segment_start(self) -> npt.NDArray[np.int32]: ...
    @property
    def segment_slot(self) -> npt.NDArray[np.int32]: ...


class TilesOfSite(Protocol):
    """Where the tiles of all adapters for one linear layer, or for a part of a joined one, are (SiteTables)."""

    @property
    def planes(self) -> torch.Tensor: ...
    @property
    def first_tile(self) -> torch.Tensor: ...
    @property
    def rank_groups(self) -> torch.Tensor: ...
    @property
    def in_size(self) -> int: ...
    @property
    def out_size(self) -> int: ...
    @property
    def out_begin(self) -> int: ...
    @property
    def tile_width(self) -> int: ...
    @property
    def tiles_per_plane(self) -> int: ...


class RecordedRows(ABC):
    """The rows of recorded steps by adapter, at fixed addresses: each replay takes the rows that are there."""

    @abstractmethod
    def fill(self, batch: RowsByAdapter) -> None: ...

    @abstractmethod
    def first(self, rows: int) -> Self:
        """The same for steps of at most `rows` rows, on the same memory."""


class LoraKernel(Protocol):
    order: TileOrder

    def add(
        self, x: torch.Tensor, out: torch.Tensor, sites: Sequence[TilesOfSite], batch: RowsByAdapter | RecordedRows
    ) -> None:
        """Add the products of the rows' adapters for a layer: `x` (rows, in), `out` (rows, outputs of the layer)."""
        ...

    def add_embedding(
        self, ids: torch.Tensor, out: torch.Tensor, site: TilesOfSite, batch: RowsByAdapter | RecordedRows
    ) -> None:
        """Add the products of the rows' adapters for an embedding, whose inputs are tokens: `ids` (rows,) int64, `out`
        (rows, hidden)."""
        ...

    def recorded_rows(self, rows: int, device: torch.device) -> RecordedRows | None:
        """For steps of at most `rows` rows; None: steps with adapters cannot be recorded."""
        ...


class LoraSiteStruct(ctypes.Structure):
    """LoraSite in lora.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("planes", "first", "groups")),
        *((name, c_int64) for name in ("in", "out", "width", "plane_tiles", "shift")),
    ]

    @classmethod
    def of(cls, site: TilesOfSite, shift: int) -> LoraSiteStruct:
        """The tables must outlive it. `shift`: the site's output o is output o + shift of the layer."""
        return cls(
            site.planes.data_ptr(), site.first_tile.data_ptr(), site.rank_groups.data_ptr(),
            site.in_size, site.out_size, site.tile_width, site.tiles_per_plane, shift,
        )  # fmt: skip


class LoraRowsStruct(ctypes.Structure):
    """LoraRows in lora.h."""

    _fields_ = [*((name, c_void_p) for name in ("row_index", "segment_start", "segment_slot")), ("segments", c_int64)]

    @classmethod
    def of(cls, batch: RowsByAdapter) -> LoraRowsStruct:
        """The batch must outlive it."""
        return cls(
            batch.row_index.ctypes.data, batch.segment_start.ctypes.data, batch.segment_slot.ctypes.data,
            len(batch.segment_slot),
        )  # fmt: skip


class CpuLoraKernel:
    """`LoraKernel` in C++. A row's result depends neither on other rows nor on the number of threads."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        library.add_lora.argtypes = (
            *(c_void_p, c_int64, c_int64, c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int),
        )
        library.add_embedding_lora.argtypes = (*(c_void_p,) * 4, c_int64)
        self._library: Any = library
        self._dtype = dtype
        pair: int = library.pair()
        self.order = TileOrder(2 * pair, LANES, pair)

    @classmethod
    def load(cls, dtype: torch.dtype) -> CpuLoraKernel | None:
        library = cpu_library(dtype)
        return None if library is None else cls(library, dtype)

    def recorded_rows(self, rows: int, device: torch.device) -> RecordedRows | None:
        return None

    def add(
        self, x: torch.Tensor, out: torch.Tensor, sites: Sequence[TilesOfSite], batch: RowsByAdapter | RecordedRows
    ) -> None:
        """See `LoraKernel.add`. Raises RuntimeError when a tensor's shape or dtype does not fit the sites."""
        width = x.shape[-1]
        if isinstance(batch, RecordedRows):
            raise RuntimeError("steps cannot be recorded on CPUs")
        if (
            x.dtype != self._dtype
            or out.dtype not in (self._dtype, torch.float32)
            or any(site.in_size != width or site.out_begin + site.out_size > out.shape[-1] for site in sites)
            or x.stride(-1) != 1
            or out.stride(-1) != 1
        ):
            raise RuntimeError(
                f"adapters cannot be added to {tuple(out.shape)} outputs of {tuple(x.shape)} inputs in {x.dtype}"
            )
        structs = [LoraSiteStruct.of(site, site.out_begin) for site in sites]
        pointers = (c_void_p * len(structs))(*(ctypes.addressof(struct) for struct in structs))
        rows = LoraRowsStruct.of(batch)
        too_many = self._library.add_lora(
            x.data_ptr(), x.stride(0), len(x), pointers, len(structs), ctypes.byref(rows),
            out.data_ptr(), out.stride(0), int(out.dtype == torch.float32),
        )  # fmt: skip
        if too_many:
            raise RuntimeError(f"a layer has too many parts for the kernel of adapters: {len(structs)}")

    def add_embedding(
        self, ids: torch.Tensor, out: torch.Tensor, site: TilesOfSite, batch: RowsByAdapter | RecordedRows
    ) -> None:
        """See `LoraKernel.add_embedding`. Raises RuntimeError when a tensor's shape or dtype does not fit the site."""
        if isinstance(batch, RecordedRows):
            raise RuntimeError("steps cannot be recorded on CPUs")
        if (
            ids.dtype != torch.int64
            or out.dtype != self._dtype
            or out.stride(-1) != 1
            or out.shape[-1] != site.out_size
        ):
            raise RuntimeError(f"adapters of an embedding cannot be added to {tuple(out.shape)} values in {out.dtype}")
        struct, rows = LoraSiteStruct.of(site, 0), LoraRowsStruct.of(batch)
        self._library.add_embedding_lora(
            ids.data_ptr(), ctypes.byref(struct), ctypes.byref(rows), out.data_ptr(), out.stride(0)
        )
