"""The small steps between matrix products that are done in one pass each, and who does them on a device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from fastserve.engine.kernels.elementwise import ElementwiseKernels


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


class _ByDevice:
    """Of a model whose parts live on several kinds of devices."""

    def __init__(self, steps: Mapping[str, ElementwiseOps]) -> None:
        self._steps = steps

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        return self._steps[x.device.type].rms_norm(x, weight, eps, offset)

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return self._steps[x.device.type].silu_and_mul(x)

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self._steps[x.device.type].rotary(x, cos, sin)


def find_elementwise_ops(dtype: torch.dtype, devices: Iterable[torch.device]) -> ElementwiseOps | None:
    """For tensors on all of these devices. None where kernels cannot be had for each: then the model's own code does
    these steps."""
    by_type: dict[str, ElementwiseOps] = {}
    for device in devices:
        steps = by_type.get(device.type) or _find(dtype, device)
        if steps is None:
            return None
        by_type[device.type] = steps
    return next(iter(by_type.values())) if len(by_type) == 1 else _ByDevice(by_type)


def _find(dtype: torch.dtype, device: torch.device) -> ElementwiseOps | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from fastserve.engine.kernels.triton_elementwise import TritonElementwiseKernels

        return TritonElementwiseKernels()
    return ElementwiseKernels.load(dtype, device)
