"""How weights are quantized while they are read (--load-8bit, --load-4bit)."""

from __future__ import annotations

import torch

from fastserve.engine.devices.find import device_of
from fastserve.engine.layers.layouts.layout import Quantize, WeightLayout
from fastserve.engine.layers.quantization import quantize_int8, quantize_nf4

_OURS: dict[str, Quantize] = {"int8": quantize_int8, "nf4": quantize_nf4}


def find_quantizer(name: str) -> Quantize:
    """`name`: int8 or nf4.

    Weights of 4 bits by bitsandbytes where it is faster and has a wheel (on CUDA). On CPUs, and in 8 bits anywhere,
    products with our own layouts are faster; and bitsandbytes' products of 8 bits wait for the device, so that steps
    cannot be recorded.
    """

    def quantize(weight: torch.Tensor, dtype: torch.dtype) -> WeightLayout:
        if name == "nf4" and device_of(weight.device).prefers_bitsandbytes:
            from fastserve.engine.layers.layouts.bitsandbytes import BitsAndBytesWeight

            return BitsAndBytesWeight(weight, dtype)
        return _OURS[name](weight, dtype)

    return quantize
