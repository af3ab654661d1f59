"""Weights as bitsandbytes keeps them, by its CPU backend. The engine uses it on CUDA only."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.layers.layouts.bitsandbytes import BitsAndBytesWeight
from fastserve.engine.layers.linear import Linear
from fastserve.engine.layers.quantization import quantize_nf4
from fastserve.engine.loading.loader import LoadedModel, load_model
from fastserve.engine.settings import WeightOptions

from .conftest import SHAPE, logits_of

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin" and platform.machine() == "x86_64", reason="bitsandbytes has no wheel for this platform"
)

ERROR, DIFFERENCE = 0.12, 0.03
"""Of the weight (and of a product), and what it differs from ours by (its scales are rounded too), relative to their
lengths."""
LOGITS = 0.08
"""What the logits of three layers of them differ by. Those of another model differ by 1.4."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_of_bitsandbytes_is_one_of_ours(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, other, x, bias = torch.randn(96, 128), torch.randn(96, 128), torch.randn(5, 128), torch.randn(96)
    form = BitsAndBytesWeight(weight, dtype)
    ours = quantize_nf4(weight, torch.float32)
    assert form.get().dtype is dtype
    assert (form.get() - weight).norm() <= ERROR * weight.norm()
    assert (form.get() - ours.get()).norm() <= DIFFERENCE * weight.norm()
    assert torch.equal(form.part(slice(16, 48)).get(), form.get()[16:48])
    expected = x @ weight.t() + bias
    # Its CPU backend packs a weight of 4 bits anew with the first product, after which it cannot be read as on CUDA.
    found = form.product(x.to(dtype), bias.to(dtype))
    assert found.dtype is dtype
    assert (found - expected).norm() <= ERROR * expected.norm()
    form.set(other)
    assert (form.get() - other).norm() <= ERROR * other.norm()


def load(path: str, kind: str = "nf4") -> LoadedModel:
    return load_model(
        path, "cpu", "float32", trust_remote_code=False, progress=lambda *_: None, options=WeightOptions(quantize=kind)
    )


def test_a_model_loaded_by_bitsandbytes_computes_what_ours_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All linear layers but the head come through it while the weights are read, and the start's trials pass."""
    torch.manual_seed(0)
    # Its CPU backend takes weights of 4 bits in blocks of 32.
    config = LlamaConfig(**{**SHAPE, "hidden_size": 64, "intermediate_size": 128})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    path = str(tmp_path)
    tokens = list(range(2, 40))
    ours = logits_of(load(path), tokens)
    monkeypatch.setattr(CpuDevice, "prefers_bitsandbytes", True)
    loaded = load(path)
    layouts = [type(module.layout) for module in loaded.model.modules() if isinstance(module, Linear)]
    assert layouts.count(BitsAndBytesWeight) == len(layouts) - 1 == 3 * 7
    found = logits_of(loaded, tokens)
    assert (found - ours).norm() <= LOGITS * ours.norm()
    layouts = [type(module.layout) for module in load(path, "int8").model.modules() if isinstance(module, Linear)]
    assert BitsAndBytesWeight not in layouts, "with 8 bits ours are faster everywhere"
