"""The one linear layer class, and the forms in which it keeps its weight.

On a CPU, oneDNN multiplies with a weight in a blocked layout of its own; reordering the weight once instead of at each
call makes the product two to three times as fast (see docs/performance.md). The plain form is dropped, not kept beside.
A new form (sharded, quantised) is one more class with these three methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F


class WeightForm(Protocol):
    """How a weight of shape (out, in) is kept."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` (..., in) -> (..., out)"""
        ...

    def get(self) -> torch.Tensor:
        """The weight as a plain tensor (out, in)."""
        ...

    def set(self, weight: torch.Tensor) -> None:
        """Replace it by `weight` (out, in)."""
        ...


class PlainWeight:
    """As the checkpoint has it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self._weight, bias)

    def get(self) -> torch.Tensor:
        return self._weight

    def set(self, weight: torch.Tensor) -> None:
        self._weight.copy_(weight)


class PackedWeight:
    """Reordered for oneDNN (CPU)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._dtype = weight.dtype
        self.set(weight)

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if weight.dtype is torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if weight.dtype is torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        return weight.dtype is torch.float32

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return out

    def get(self) -> torch.Tensor:
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def set(self, weight: torch.Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self._dtype).contiguous(), None)


class _JointPart:
    """Some rows of a weight that is kept together with others."""

    def __init__(self, whole: WeightForm, rows: slice) -> None:
        self._whole = whole
        self._rows = rows

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.get(), bias)

    def get(self) -> torch.Tensor:
        return self._whole.get()[self._rows]

    def set(self, weight: torch.Tensor) -> None:
        whole = self._whole.get().clone()
        whole[self._rows] = weight
        self._whole.set(whole)


def form_of(weight: torch.Tensor) -> WeightForm:
    """The fastest form that this weight can have."""
    return PackedWeight(weight) if PackedWeight.supports(weight) else PlainWeight(weight)


def joint_form(weights: Sequence[torch.Tensor]) -> tuple[WeightForm, list[WeightForm]]:
    """One weight for layers that take the same input, and each layer's own as a part of it."""
    whole = form_of(torch.cat(list(weights)))
    parts: list[WeightForm] = []
    start = 0
    for weight in weights:
        parts.append(_JointPart(whole, slice(start, start + weight.shape[0])))
        start += weight.shape[0]
    return whole, parts


class Linear(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """y = x W^T + b, and what adapters add to it."""

    def __init__(self, weight: WeightForm, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.form = weight
        self.bias = bias
        self.delta: Callable[[torch.Tensor], torch.Tensor] | None = None
        """For `x` (..., in) of a packed batch, what the adapters of its sequences add: (..., out)."""

    @property
    def weight(self) -> torch.Tensor:
        """A plain tensor (out, in), for model code that looks at it; made anew when the weight is packed."""
        return self.form.get()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.form.product(x, self.bias)
        return out if self.delta is None else out + self.delta(x)
