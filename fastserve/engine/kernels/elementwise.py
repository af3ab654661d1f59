"""The binding of elementwise.h: fused elementwise operations on CPU tensors."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch

from fastserve.engine.kernels.build import cpu_library

_SIGNATURES = {
    "rms_norm": (*(c_void_p,) * 3, *(c_int64,) * 3, c_float, c_float),
    "silu_and_mul": (*(c_void_p,) * 2, *(c_int64,) * 2),
    "rotary": (*(c_void_p,) * 4, *(c_int64,) * 5),
}


class ElementwiseKernels:
    """`ElementwiseOps` for CPU tensors of the dtypes passed to `load`, and float32."""

    def __init__(self) -> None:
        self._libraries: dict[torch.dtype, Any] = {}

    @classmethod
    def load(cls, dtype: torch.dtype) -> ElementwiseKernels | None:
        """The kernels for `dtype` and float32, or None where they cannot be built."""
        kernels = cls()
        built = all(kernels._add(needed) for needed in (dtype, torch.float32))
        return kernels if built else None

    def _add(self, dtype: torch.dtype) -> bool:
        library = cpu_library(dtype)
        if library is None:
            return False
        for name, signature in _SIGNATURES.items():
            getattr(library, name).argtypes = signature
        self._libraries[dtype] = library
        return True

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._libraries[x.dtype].rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, size, eps, offset
        )
        return out

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 * size), gate and up side by side -> silu(gate) * up, (..., size)"""
        x = x.contiguous()
        size = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], size)
        rows = x.numel() // (2 * size)
        self._libraries[x.dtype].silu_and_mul(x.data_ptr(), out.data_ptr(), rows, size)
        return out

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of `x` (1, heads, tokens, dim) by halves (GPT-NeoX style); `cos` and `sin` (1, tokens, dim).

        The memory layout of the result is (tokens, heads, dim).
        """
        if x.stride(3) != 1:
            x = x.contiguous()
        _, heads, tokens, dim = x.shape
        out = x.new_empty(1, tokens, heads, dim)
        cos, sin = cos.contiguous(), sin.contiguous()
        self._libraries[x.dtype].rotary(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), tokens, heads, dim, x.stride(2), x.stride(1)
        )
        return out.transpose(1, 2)
