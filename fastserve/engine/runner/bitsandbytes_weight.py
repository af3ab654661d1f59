"""Weights of 8 and 4 bits as bitsandbytes keeps and multiplies them on CUDA (Dettmers et al., LLM.int8, 2022, and
QLoRA, 2023).

Written without a GPU at hand: this file has run on the library's CPU backend only (tests/engine/test_bitsandbytes.py).
"""

from __future__ import annotations

from typing import Any

import torch

from fastserve.engine.runner.linear import RowsOfWeight, WeightForm

_THRESHOLD = 6.0
"""Inputs beyond it are multiplied in 16 bits (LLM.int8)."""
_INT8_RANGE = 127.0


class BitsAndBytesWeight:
    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, kind: str) -> None:
        """`weight` (out, in) on a CUDA device; `kind`: int8 or nf4."""
        self._dtype = dtype
        self._kind = kind
        self._layer: Any = None
        self.set(weight)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = self._layer(x)
        return y if bias is None else y + bias

    def get(self) -> torch.Tensor:
        import bitsandbytes.functional as functions

        weight = self._layer.weight
        if self._kind == "nf4":
            return functions.dequantize_4bit(weight.data, weight.quant_state).to(self._dtype)
        # The scales move from the weight to the layer's state with the first product.
        scales = self._layer.state.SCB if self._layer.state.SCB is not None else weight.SCB
        return (weight.data.float() * (scales.float().unsqueeze(1) / _INT8_RANGE)).to(self._dtype)

    def set(self, weight: torch.Tensor) -> None:
        import bitsandbytes as bnb

        out, width = weight.shape
        device = weight.device
        with torch.device("meta"):
            if self._kind == "nf4":
                layer = bnb.nn.Linear4bit(width, out, bias=False, compute_dtype=self._dtype, quant_type="nf4")
            else:
                layer = bnb.nn.Linear8bitLt(width, out, bias=False, has_fp16_weights=False, threshold=_THRESHOLD)
        # bitsandbytes quantises when a weight comes to the GPU.
        source = weight.to("cpu", torch.float16 if self._kind == "int8" else self._dtype)
        if self._kind == "nf4":
            layer.weight = bnb.nn.Params4bit(source, requires_grad=False, quant_type="nf4").to(device)
        else:
            layer.weight = bnb.nn.Int8Params(source, requires_grad=False, has_fp16_weights=False).to(device)
        self._layer = layer.eval()

    def part(self, rows: slice) -> WeightForm:
        return RowsOfWeight(self, rows)

    def struct(self, bias: torch.Tensor | None) -> None:
        return None
