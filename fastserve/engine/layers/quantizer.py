"""How weights are quantized while they are read (--load-8bit, --load-4bit)."""

from __future__ import annotations

import importlib.util

import torch

from fastserve.engine.layers.layouts.layout import Quantize, WeightLayout
from fastserve.engine.layers.quantization import quantize_int8, quantize_nf4

_OURS: dict[str, Quantize] = {"int8": quantize_int8, "nf4": quantize_nf4}


def find_quantizer(name: str) -> Quantize:
    """`name`: int8 or nf4. By bitsandbytes where it is the faster one and has a wheel for the platform; else in our own
    layout."""

    def quantize(weight: torch.Tensor, dtype: torch.dtype) -> WeightLayout:
        if name == "nf4" and uses_bitsandbytes(weight.device):
            from fastserve.engine.layers.layouts.bitsandbytes import BitsAndBytesWeight

            return BitsAndBytesWeight(weight, dtype)
        return _OURS[name](weight, dtype)

    return quantize


def uses_bitsandbytes(device: torch.device) -> bool:
    """Weights of 4 bits on CUDA only: on CPUs, and of 8 bits anywhere, the products of our own layouts are faster. (Its
    products of 8 bits wait for the device, so that steps cannot be recorded.)"""
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
