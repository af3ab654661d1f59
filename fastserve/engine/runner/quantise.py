"""How weights are quantised while they are read (--load-8bit, --load-4bit)."""

from __future__ import annotations

import importlib.util

import torch

from fastserve.engine.runner.assembly import Quantise
from fastserve.engine.runner.linear import WeightForm
from fastserve.engine.runner.quantised import quantise_int8, quantise_nf4

_OURS: dict[str, Quantise] = {"int8": quantise_int8, "nf4": quantise_nf4}


def find_quantiser(name: str) -> Quantise:
    """`name`: int8 or nf4. By bitsandbytes where it is the faster one and has a wheel for the platform; else in our own
    form."""

    def quantise(weight: torch.Tensor, dtype: torch.dtype) -> WeightForm:
        if name == "nf4" and uses_bitsandbytes(weight.device):
            from fastserve.engine.runner.bitsandbytes_weight import BitsAndBytesWeight

            return BitsAndBytesWeight(weight, dtype)
        return _OURS[name](weight, dtype)

    return quantise


def uses_bitsandbytes(device: torch.device) -> bool:
    """Weights of 4 bits on CUDA only: on CPUs, and of 8 bits anywhere, the products of our own forms are faster. (Its
    products of 8 bits wait for the device, so that steps cannot be recorded.)"""
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
