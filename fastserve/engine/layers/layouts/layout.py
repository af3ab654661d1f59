"""How a weight of a linear layer is kept: the contract of all weight layouts.

A new layout (another quantization, cut over ranks) is one more file with a class that has these methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from fastserve.engine.kernels.packed_linear import WeightStruct


class WeightLayout(Protocol):
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

    def part(self, rows: slice) -> WeightLayout:
        """Some outputs of it, as a layout that shares its memory."""
        ...

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        """What kernels for CPUs are told of it, None where they cannot multiply with it. It points to memory that stays
        in its place as long as this object and `bias` live, also when the weight is set."""
        ...


@runtime_checkable
class EmbeddingLayout(WeightLayout, Protocol):
    """A layout that an embedding tied to the layer can share."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` (...) of outputs -> their weights (..., in)"""
        ...


class RowsOfWeight:
    """Some rows of a weight that can only be taken apart as a whole."""

    def __init__(self, whole: WeightLayout, rows: slice) -> None:
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

    def part(self, rows: slice) -> WeightLayout:
        return RowsOfWeight(self._whole, slice(self._rows.start + rows.start, self._rows.start + rows.stop))

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        return None


Quantize = Callable[[torch.Tensor, torch.dtype], WeightLayout]
"""From a weight (out, in) to its quantized layout, for products in a dtype."""
