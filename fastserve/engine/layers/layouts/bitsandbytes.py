"""4-bit weights (nf4) stored and multiplied by bitsandbytes, on CUDA (Dettmers et al., QLoRA, 2023)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from fastserve.engine.layers.layouts.layout import Memo, WeightLayout
from fastserve.engine.layers.layouts.rows import RowsOfWeight


class BitsAndBytesWeight:
    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        """`weight` (out, in) on a CUDA device."""
        self._dtype = dtype
        self._layer: Any = None
        self.set(weight)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = self._layer(x)
        return y if bias is None else y + bias

    def partial_product(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, None)

    def get(self) -> torch.Tensor:
        import bitsandbytes.functional as functions

        weight = self._layer.weight
        return functions.dequantize_4bit(weight.data, weight.quant_state).to(self._dtype)

    def set(self, weight: torch.Tensor) -> None:
        import bitsandbytes as bnb

        out, width = weight.shape
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(width, out, bias=False, compute_dtype=self._dtype, quant_type="nf4")
        # bitsandbytes quantizes a weight when it is moved to the GPU.
        source = weight.to("cpu", self._dtype)
        layer.weight = bnb.nn.Params4bit(source, requires_grad=False, quant_type="nf4").to(weight.device)
        self._layer = layer.eval()

    def copied(self, memo: Memo) -> BitsAndBytesWeight:
        return copy.deepcopy(self, memo)

    def take_over(self, other: BitsAndBytesWeight) -> None:
        for old, new in zip(self._tensors(), other._tensors(), strict=True):
            old.copy_(new)

    def tensors(self) -> Sequence[torch.Tensor]:
        return self._tensors()

    def _tensors(self) -> list[torch.Tensor]:
        """All that graphs know the addresses of."""
        state = self._layer.weight.quant_state
        nested = [] if state.state2 is None else [state.offset, state.state2.absmax]
        return [self._layer.weight.data, state.absmax, *nested]

    def part(self, rows: slice) -> WeightLayout:
        return RowsOfWeight(self, rows)

    def struct(self, bias: torch.Tensor | None) -> None:
        return None
