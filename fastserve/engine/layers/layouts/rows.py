"""Some rows of a weight whose layout cannot be sliced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastserve.engine.kernels.packed_linear import WeightStruct
from fastserve.engine.layers.layouts.layout import Memo, WeightLayout
from fastserve.engine.layers.layouts.plain import PlainWeight


class RowsOfWeight:
    """The whole weight is unpacked for each use."""

    def __init__(self, whole: WeightLayout, rows: slice) -> None:
        self._whole = whole
        self._rows = rows

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.get(), bias)

    def partial_product(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, None)

    def get(self) -> torch.Tensor:
        return self._whole.get()[self._rows]

    def set(self, weight: torch.Tensor) -> None:
        whole = self._whole.get().clone()
        whole[self._rows] = weight
        self._whole.set(whole)

    def copied(self, memo: Memo) -> PlainWeight:
        return PlainWeight(self.get().clone())

    def take_over(self, other: PlainWeight) -> None:
        self.set(other.get())

    def tensors(self) -> Sequence[torch.Tensor]:
        return self._whole.tensors()

    def part(self, rows: slice) -> WeightLayout:
        return RowsOfWeight(self._whole, slice(self._rows.start + rows.start, self._rows.start + rows.stop))

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        return None
