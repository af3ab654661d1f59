"""The contract of fused elementwise operations, each in one pass over memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class ElementwiseOps(Protocol):
    """Each computes in float32 and returns the dtype of its input."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension."""
        ...

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 * size), gate and up side by side -> silu(gate) * up, (..., size)"""
        ...

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of `x` (1, heads, tokens, dim) by halves (GPT-NeoX style); `cos` and `sin` (1, tokens,
        dim)."""
        ...


class ElementwiseOpsByDevice:
    """For a model whose parts are on several kinds of devices."""

    def __init__(self, ops: Mapping[str, ElementwiseOps]) -> None:
        self._ops = ops

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        return self._ops[x.device.type].rms_norm(x, weight, eps, offset)

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops[x.device.type].silu_and_mul(x)

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self._ops[x.device.type].rotary(x, cos, sin)
