"""Quantization of weights while they are loaded (--load-8bit, --load-4bit)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastserve.engine.devices.find import device_of
from fastserve.engine.layers.layouts.layout import Across, Quantize, WeightLayout
from fastserve.engine.layers.quantization import quantize_int8, quantize_nf4

_OURS: dict[str, Callable[..., WeightLayout]] = {"int8": quantize_int8, "nf4": quantize_nf4}


def find_quantizer(name: str) -> Quantize:
    """`name`: int8 or nf4.

    4-bit weights use bitsandbytes where it is faster and has a wheel (on CUDA). On CPUs, and with 8 bits on any device,
    products with our own layouts are faster; besides, bitsandbytes' 8-bit products synchronize with the device, so
    steps could not be captured in CUDA graphs.
    """

    def quantize(weight: torch.Tensor, dtype: torch.dtype, across: Across | None = None) -> WeightLayout:
        if name == "nf4" and device_of(weight.device).prefers_bitsandbytes:
            from fastserve.engine.layers.layouts.bitsandbytes import BitsAndBytesWeight

            return BitsAndBytesWeight(weight, dtype)
        return _OURS[name](weight, dtype, across=across)

    return quantize
