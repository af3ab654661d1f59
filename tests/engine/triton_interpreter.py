"""Triton's kernels on machines with and without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

from fastserve.engine.attention.backend import AttentionBackend
from fastserve.engine.attention.metadata import LayerShape
from fastserve.engine.devices.device import Device

# tests/conftest.py sets it where there is no GPU.
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for a GPU here"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def import_kernels(name: str) -> ModuleType:
    """A module of fastserve.engine.kernels. Skips the calling test or test file where the package triton is missing."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed", allow_module_level=True)
    return importlib.import_module(f"fastserve.engine.kernels.{name}")


def triton_attention(
    device: Device, shapes: Sequence[LayerShape], dtype: torch.dtype, block_size: int
) -> AttentionBackend:
    """The method of a device that has the Triton kernel."""
    from fastserve.engine.attention.triton_backend import TritonAttention

    return TritonAttention(device.torch_device, dtype, block_size, device.send)
