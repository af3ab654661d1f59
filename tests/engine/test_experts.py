"""Mixture-of-experts layers whose experts are packed or quantized one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastserve.engine.layers.experts import Experts
from fastserve.engine.layers.layouts.packed import GroupedWeight
from fastserve.engine.layers.layouts.plain import PlainWeight
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.loading.loader import LoadedModel, load_model
from fastserve.engine.settings import WeightOptions

from .conftest import TinyModels, logits_of

MIXTURES = ["qwen3_moe", "mixtral", "gpt_oss"]
"""The last one has biases, transposed weights, and its own gate function."""


def load(path: str, dtype: str = "float32", quantize: Any = None) -> LoadedModel:
    options = WeightOptions(quantize=quantize)
    return load_model(path, "cpu", dtype, trust_remote_code=False, progress=lambda *_: None, options=options)


def experts_of(loaded: LoadedModel) -> list[Experts]:
    return [module for module in loaded.model.modules() if isinstance(module, Experts)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MIXTURES)
def test_they_are_packed_and_kept_once(tiny_models: TinyModels, name: str, dtype: str) -> None:
    layers = experts_of(load(tiny_models.path(name), dtype))
    assert len(layers) == 3
    for layer in layers:
        assert layer.layouts.keys() == {"gate_up_proj", "down_proj"}
        assert {type(layout) for layouts in layer.layouts.values() for layout in layouts} == {GroupedWeight}
        assert {len(layouts) for layouts in layer.layouts.values()} == {4}
        assert not [parameter for parameter in layer.parameters() if parameter.dim() == 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURES)
def test_they_compute_what_the_models_own_code_does(tiny_models: TinyModels, name: str, dtype: torch.dtype) -> None:
    path = tiny_models.path(name)
    layer = experts_of(load(path, str(dtype).removeprefix("torch.")))[1]
    own = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    theirs = next(
        module for at, module in own.named_modules() if at.endswith("experts") and ".1." in at
    )  # of the second layer
    torch.manual_seed(0)
    x = torch.randn(37, theirs.down_proj.shape[1 if not layer.is_transposed else 2]).to(dtype)
    top_k_index = torch.stack([torch.randperm(4)[:2] for _ in range(37)])
    top_k_index[top_k_index == 3] = 0  # one expert gets nothing, and some tokens go to the same one twice
    top_k_weights = torch.rand(37, 2).to(dtype)
    with torch.inference_mode():
        expected, found = theirs(x, top_k_index, top_k_weights), layer(x, top_k_index, top_k_weights)
        alone = torch.cat([layer(x[i : i + 1], top_k_index[i : i + 1], top_k_weights[i : i + 1]) for i in range(37)])
    assert found.dtype is dtype
    error = (found.float() - expected.float()).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * expected.float().abs().max()
    assert torch.equal(found, alone), "a token's result depends on other tokens of the batch"


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_they_are_quantized_as_linear_layers_are(tiny_models: TinyModels, name: str, quantize: str) -> None:
    loaded = load(tiny_models.path(name), quantize=quantize)
    for layer in experts_of(loaded):
        assert {type(layout) for layouts in layer.layouts.values() for layout in layouts} == {QuantizedWeight}
    # A model with the dequantized weights computes the same.
    dequantized = AutoModelForCausalLM.from_pretrained(tiny_models.path(name), dtype=torch.float32).eval()
    unchanged = dequantized.state_dict()["model.layers.0.mlp.experts.down_proj"].clone()
    with torch.no_grad():
        for weight_name, parameter in dequantized.named_parameters():
            parameter.copy_(loaded.weights.get(weight_name))
    changed = dequantized.state_dict()["model.layers.0.mlp.experts.down_proj"]
    assert 0.0 < (changed - unchanged).norm() < 0.2 * unchanged.norm()
    tokens = torch.randint(2, 160, (1, 23))
    dequantized.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = dequantized(input_ids=tokens, use_cache=False).logits[0]
    found = logits_of(loaded, tokens[0].tolist())
    assert (expected - found).abs().max() < 1e-3 * expected.abs().max()


def test_a_weight_without_layouts_is_a_parameter(tiny_models: TinyModels) -> None:
    """As with quantized weights besides plain ones on a GPU."""
    own = AutoModelForCausalLM.from_pretrained(tiny_models.path("gpt_oss"), dtype=torch.float32)
    theirs = own.model.layers[0].mlp.experts
    layer = Experts(theirs)
    x, top_k_index, top_k_weights = torch.randn(5, 48), torch.randint(4, (5, 2)), torch.rand(5, 2)
    with torch.inference_mode():
        expected = theirs(x, top_k_index, top_k_weights)
        assert torch.allclose(layer(x, top_k_index, top_k_weights), expected, atol=1e-5)
        layer.set_layouts("down_proj", [PlainWeight(weight.t()) for weight in theirs.down_proj])
        assert torch.allclose(layer(x, top_k_index, top_k_weights), expected, atol=1e-5)
    assert "down_proj" not in dict(layer.named_parameters())
    assert "gate_up_proj" in dict(layer.named_parameters())
