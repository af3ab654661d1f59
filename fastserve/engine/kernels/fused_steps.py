"""The small steps between matrix products that are done in one pass each, and who does them on a device."""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch

from fastserve.engine.kernels.elementwise import ElementwiseKernels


class FusedSteps(Protocol):
    """Each computes in float32 and returns the dtype of its input."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension."""
        ...

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 * size), gate and up side by side -> silu(gate) * up, (..., size)"""
        ...

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`x` (1, heads, tokens, dim), `cos` and `sin` (1, tokens, dim): the rotary embedding by halves."""
        ...


def find_fused_steps(dtype: torch.dtype, device: torch.device) -> FusedSteps | None:
    """None where no kernel can be had: then the model's own code does these steps."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from fastserve.engine.kernels.triton_elementwise import TritonElementwiseKernels

        return TritonElementwiseKernels()
    return ElementwiseKernels.load(dtype, device)
