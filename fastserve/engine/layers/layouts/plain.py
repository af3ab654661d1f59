"""A dense, unpacked weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastserve.engine.kernels.packed_linear import WeightStruct
from fastserve.engine.layers.layouts.layout import Memo, WeightLayout, memory_like


class PlainWeight:
    """The dense tensor (out, in)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self._weight, bias)

    def partial_product(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, None)

    def get(self) -> torch.Tensor:
        return self._weight

    def set(self, weight: torch.Tensor) -> None:
        self._weight.copy_(weight)

    def copied(self, memo: Memo) -> PlainWeight:
        return PlainWeight(memory_like(self._weight, memo))

    def take_over(self, other: PlainWeight) -> None:
        self._weight.copy_(other._weight)

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self._weight,)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self._weight)

    def part(self, rows: slice) -> WeightLayout:
        return PlainWeight(self._weight[rows])

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        return None
