"""bitsandbytes weights, on its CPU backend. The engine uses bitsandbytes on CUDA only."""

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
"""Maximum error of the weight (and of a product), and difference to our nf4 (whose scales are not rounded), relative to
their norms."""
LOGITS = 0.08
"""Maximum difference of the logits of three such layers. Those of another model differ by 1.4."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_of_bitsandbytes_is_one_of_ours(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, other, x, bias = torch.randn(96, 128), torch.randn(96, 128), torch.randn(5, 128), torch.randn(96)
    layout = BitsAndBytesWeight(weight, dtype)
    ours = quantize_nf4(weight, torch.float32)
    assert layout.get().dtype is dtype
    assert (layout.get() - weight).norm() <= ERROR * weight.norm()
    assert (layout.get() - ours.get()).norm() <= DIFFERENCE * weight.norm()
    assert torch.equal(layout.part(slice(16, 48)).get(), layout.get()[16:48])
    expected = x @ weight.t() + bias
    # Its CPU backend repacks a 4-bit weight at the first product; then it cannot be dequantized as on CUDA.
    found = layout.product(x.to(dtype), bias.to(dtype))
    assert found.dtype is dtype
    assert (found - expected).norm() <= ERROR * expected.norm()
    layout.set(other)
    assert (layout.get() - other).norm() <= ERROR * other.norm()


def load(path: str, kind: str = "nf4") -> LoadedModel:
    return load_model(
        path, "cpu", "float32", trust_remote_code=False, progress=lambda *_: None, options=WeightOptions(quantize=kind)
    )


def test_a_model_loaded_by_bitsandbytes_computes_what_ours_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All linear layers but the LM head are quantized by it while loading, and the checks at start pass."""
    torch.manual_seed(0)
    # Its CPU backend needs widths in blocks of 32.
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
