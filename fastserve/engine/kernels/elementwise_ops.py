"""The small operations between matrix products that are done in one pass each."""

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
        """`x` (1, heads, tokens, dim), `cos` and `sin` (1, tokens, dim): the rotary embedding by halves."""
        ...


class ElementwiseOpsByDevice:
    """For a model whose parts live on several kinds of devices."""

    def __init__(self, ops: Mapping[str, ElementwiseOps]) -> None:
        self._ops = ops

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        return self._ops[x.device.type].rms_norm(x, weight, eps, offset)

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops[x.device.type].silu_and_mul(x)

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self._ops[x.device.type].rotary(x, cos, sin)
