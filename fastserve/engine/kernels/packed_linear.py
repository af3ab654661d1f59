"""The binding of linear.h: matrix products with packed weights, dense or quantized."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch

from fastserve.engine.huge_pages import zeros
from fastserve.engine.kernels.build import cpu_library

LANES = 16
UNIT = 64
"""Number of outputs that a quantized weight is padded to a multiple of."""


class WeightStruct(ctypes.Structure):
    """Weight in tiles.h. The last six fields are for quantized weights; bits 0 means dense."""

    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("out", "in", "bits", "group")),
        *((name, c_void_p) for name in ("scales", "offsets", "table", "order")),
    ]


class PackedLinearKernel:
    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._dtype = dtype
        library.linear.argtypes = library.linear_in_float32.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_void_p)
        library.pack_weight.argtypes = library.unpack_weight.argtypes = (c_void_p, c_void_p, c_int64, c_int64)
        library.pack_codes.argtypes = library.unpack_codes.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_int)
        library.weight_rows.argtypes = (c_void_p, c_void_p, c_int64, c_void_p)
        self._library: Any = library

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinearKernel:
        return self  # copies of a layout use the same library

    @classmethod
    def load(cls, dtype: torch.dtype, *, for_codes: bool = False) -> PackedLinearKernel | None:
        """The kernel, or None where it cannot be built or, for dense weights, is not faster than oneDNN."""
        library = cpu_library(dtype)
        return None if library is None or not (for_codes or library.has_fast_products()) else cls(library, dtype)

    def supports(self, weight: torch.Tensor) -> bool:
        pair: int = self._library.pair()
        return weight.device.type == "cpu" and weight.dim() == 2 and int(weight.shape[1]) % pair == 0

    def pack(self, weight: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
        """`weight` (out, in) in the kernel's layout, as a flat tensor; written to `packed` if given."""
        weight = weight.contiguous()
        out, width = weight.shape
        if packed is None:
            packed = self.empty(out, width, weight.dtype)
        self._library.pack_weight(weight.data_ptr(), packed.data_ptr(), out, width)
        return packed

    def empty(self, out: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor for a weight (out, in) in the kernel's layout."""
        return zeros((-(-out // LANES) * LANES * width,), dtype)

    def unpack(self, packed: torch.Tensor, out: int, width: int) -> torch.Tensor:
        weight = packed.new_empty(out, width)
        self._library.unpack_weight(packed.data_ptr(), weight.data_ptr(), out, width)
        return weight

    def pack_codes(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        """Quantized `codes` (out, in), uint8, in the kernel's layout; `in` must be a multiple of 32 / bits."""
        codes = codes.contiguous()
        out, width = codes.shape
        packed = zeros((-(-out // UNIT) * UNIT * width * bits // 8,), torch.uint8)
        self._library.pack_codes(codes.data_ptr(), packed.data_ptr(), out, width, bits)
        return packed

    def unpack_codes(self, packed: torch.Tensor, out: int, width: int, bits: int) -> torch.Tensor:
        codes = packed.new_empty(out, width)
        self._library.unpack_codes(packed.data_ptr(), codes.data_ptr(), out, width, bits)
        return codes

    def product(self, x: torch.Tensor, weight: WeightStruct, out: int, *, in_float32: bool = False) -> torch.Tensor:
        """`x` (..., in) -> (..., out); `in_float32`: not rounded to the dtype of `x`. Raises RuntimeError, as torch
        does, when `x` does not fit the weight."""
        width, expected = x.shape[-1], getattr(weight, "in")
        if width != expected or x.dtype != self._dtype:
            raise RuntimeError(
                f"{str(x.dtype).removeprefix('torch.')} inputs of {width} cannot be multiplied with a weight for "
                f"{expected} in {str(self._dtype).removeprefix('torch.')}"
            )
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], out, dtype=torch.float32 if in_float32 else x.dtype)
        multiply = self._library.linear_in_float32 if in_float32 else self._library.linear
        multiply(x.data_ptr(), width, x.numel() // width, ctypes.byref(weight), y.data_ptr())
        return y

    def rows(self, ids: torch.Tensor, weight: WeightStruct, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Dense rows (..., in) of a weight, for `ids` (...) of outputs, int64: an embedding lookup. Raises IndexError
        for an id that the weight does not have."""
        ids = ids.contiguous()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < weight.out:
            raise IndexError(f"there is no row {int(ids.max())} or {int(ids.min())} in a weight of {weight.out} rows")
        rows = torch.empty(*ids.shape, width, dtype=dtype)
        self._library.weight_rows(ctypes.byref(weight), ids.data_ptr(), ids.numel(), rows.data_ptr())
        return rows
