"""A weight packed by oneDNN."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from fastserve.engine.kernels.packed_linear import WeightStruct
from fastserve.engine.layers.layouts.layout import Memo, WeightLayout
from fastserve.engine.layers.layouts.rows import RowsOfWeight


class OneDnnWeight:
    """Packed by oneDNN, for CPUs with matrix units (AMX), and where there is no compiler for our own kernel."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._dtype = weight.dtype
        self.set(weight)

    @classmethod
    def of(cls, weight: torch.Tensor) -> OneDnnWeight | None:
        if not torch.backends.mkldnn.is_available():
            return None
        can = {
            torch.float32: lambda: True,
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
        return cls(weight) if weight.dtype in can and can[weight.dtype]() else None

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return out

    def partial_product(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, None)

    def get(self) -> torch.Tensor:
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def set(self, weight: torch.Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self._dtype).contiguous(), None)

    def copied(self, memo: Memo) -> OneDnnWeight:
        return copy.deepcopy(self, memo)

    def take_over(self, other: OneDnnWeight) -> None:
        self._packed = other._packed  # no kernel of ours knows its address

    def tensors(self) -> Sequence[torch.Tensor]:
        return ()

    def part(self, rows: slice) -> WeightLayout:
        return RowsOfWeight(self, rows)

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        return None
