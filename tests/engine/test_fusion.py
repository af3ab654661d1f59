"""Fused parts: equal to the model's own, used where they are, and not used where the model does something else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from fastserve.engine.kernels.elementwise import ElementwiseKernels
from fastserve.engine.runner.fusion import (
    FusedGatedMLP,
    FusedRMSNorm,
    find_gated_mlps,
    fuse_gated_mlp,
    fuse_norms,
    fuse_rotary,
)

from .conftest import CONFIGS

# Sizes with and without a rest after whole vectors of 16.
SIZES = [16, 48, 100, 896]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels() -> ElementwiseKernels:
    found = ElementwiseKernels.load(torch.bfloat16, torch.device("cpu"))
    assert found is not None, "the kernels must build here, or nothing is tested"
    return found


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= TOLERANCE[found.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 7, 400])
def test_kernels_equal_their_definition(dtype: torch.dtype, size: int, rows: int) -> None:
    kernels = ElementwiseKernels.load(dtype, torch.device("cpu"))
    assert kernels is not None
    torch.manual_seed(size)
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(size).to(dtype)
    mean = x.double().pow(2).mean(-1, keepdim=True)
    for offset in (0.0, 1.0):
        expected = x.double() / (mean + 1e-5).sqrt() * (weight.double() + offset)
        assert_equal(kernels.rms_norm(x, weight, 1e-5, offset), expected)

    gate_up = (torch.randn(rows, 2 * size) * 20).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_equal(kernels.silu_and_mul(gate_up), F.silu(gate) * up)

    heads, dim = 3, size // 2 * 2
    # As attention modules have it: (tokens, heads, dim) in memory, seen as (1, heads, tokens, dim).
    q = torch.randn(1, rows, heads, dim).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(1, rows, dim).to(dtype) for _ in range(2))
    low, high = q.double().chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    assert_equal(
        kernels.rotary(q, cos, sin), q.double() * cos.double().unsqueeze(1) + turned * sin.double().unsqueeze(1)
    )


def test_extreme_gates_do_not_overflow(kernels: ElementwiseKernels) -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30] * 4)
    found = kernels.silu_and_mul(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0))
    assert torch.allclose(found[0], F.silu(gate))


@pytest.mark.parametrize(
    ("name", "norms", "mlps", "rotaries"),
    [("llama", 7, 3, 3), ("qwen3", 13, 3, 3), ("gemma2", 13, 0, 3), ("gpt2", 0, 0, 0), ("gpt_oss", 7, 0, 0)],
)
def test_parts_are_found_by_what_they_compute(
    kernels: ElementwiseKernels, name: str, norms: int, mlps: int, rotaries: int
) -> None:
    """Gemma's MLP has another activation, GPT-OSS turns by another rule: both keep their own code there."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval().requires_grad_(False)
    original = copy.deepcopy(model)
    for path in find_gated_mlps(model, kernels, lambda _: torch.device("cpu")):
        mlp = model.get_submodule(path)
        fuse_gated_mlp(model, path, mlp.gate_proj.weight.data, mlp.up_proj.weight.data, kernels)
    assert fuse_norms(model, kernels) == norms
    assert fuse_rotary(model, kernels) == rotaries
    assert sum(isinstance(module, FusedGatedMLP) for module in model.modules()) == mlps
    tokens = torch.randint(2, 160, (1, 23))
    expected, found = (one(input_ids=tokens, use_cache=False).logits for one in (original, model))
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


def test_the_library_itself_stays_as_it_is(kernels: ElementwiseKernels) -> None:
    theirs = modeling_llama.apply_rotary_pos_emb
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    assert fuse_rotary(model, kernels) == 3
    assert modeling_llama.apply_rotary_pos_emb is theirs
    other = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    attention = other.model.layers[0].self_attn
    assert attention.forward.__globals__["apply_rotary_pos_emb"] is theirs


def test_a_norm_that_does_more_is_left_alone(kernels: ElementwiseKernels) -> None:
    class OtherRMSNorm(modeling_llama.LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x) * 1.1
            return out

    model = torch.nn.Sequential(OtherRMSNorm(32), modeling_llama.LlamaRMSNorm(32)).requires_grad_(False)
    assert fuse_norms(model, kernels) == 1
    assert isinstance(model[1], FusedRMSNorm)
    assert isinstance(model[0], OtherRMSNorm)
