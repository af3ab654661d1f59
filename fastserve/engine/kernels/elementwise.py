"""The binding of elementwise.cpp: the small steps between matrix products, on CPU tensors of one dtype."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch

from fastserve.engine.kernels.build import DTYPE_NUMBERS, load_kernel

_SIGNATURES = {
    "rms_norm": (*(c_void_p,) * 3, *(c_int64,) * 3, c_float, c_float, c_int),
    "silu_and_mul": (*(c_void_p,) * 2, *(c_int64,) * 2, c_int),
    "rotary": (*(c_void_p,) * 4, *(c_int64,) * 5, c_int),
}


class ElementwiseKernels:
    def __init__(self, library: ctypes.CDLL) -> None:
        for name, signature in _SIGNATURES.items():
            getattr(library, name).argtypes = signature
        self._rms_norm: Any = library.rms_norm
        self._silu_and_mul: Any = library.silu_and_mul
        self._rotary: Any = library.rotary

    @classmethod
    def load(cls) -> ElementwiseKernels | None:
        library = load_kernel("elementwise")
        return None if library is None else cls(library)

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device) -> bool:
        return device.type == "cpu" and dtype in DTYPE_NUMBERS

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, size, eps, offset,
            DTYPE_NUMBERS[x.dtype],
        )  # fmt: skip
        return out

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 * size), gate and up side by side -> silu(gate) * up, (..., size)"""
        x = x.contiguous()
        size = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], size)
        rows = x.numel() // (2 * size)
        self._silu_and_mul(x.data_ptr(), out.data_ptr(), rows, size, DTYPE_NUMBERS[x.dtype])
        return out

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`x` (1, heads, tokens, dim), `cos` and `sin` (1, tokens, dim): the rotary embedding by halves.

        The result lies in memory as (tokens, heads, dim).
        """
        if x.stride(3) != 1:
            x = x.contiguous()
        _, heads, tokens, dim = x.shape
        out = x.new_empty(1, tokens, heads, dim)
        cos, sin = cos.contiguous(), sin.contiguous()
        self._rotary(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), tokens, heads, dim, x.stride(2), x.stride(1),
            DTYPE_NUMBERS[x.dtype],
        )  # fmt: skip
        return out.transpose(1, 2)
