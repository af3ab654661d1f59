"""Fused layers: equal to the model's own, used where they are equal, and not used where the model computes something
else."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from fastserve.demo import demo_model_path
from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.build import build_core
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.kernels.elementwise import ElementwiseKernels
from fastserve.engine.layers.fused_attention import FusedAttention
from fastserve.engine.layers.fusion import FusedGatedMLP, FusedRMSNorm, fuse_norms
from fastserve.engine.loading.loader import LoadedModel, prepare
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck.compare import Capacity, difference
from fastserve.engine.settings import EngineConfig

from .conftest import CONFIGS, TinyModels, keep_way

# Sizes with and without a remainder after vectors of 16.
SIZES = [16, 48, 100, 896]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels() -> ElementwiseKernels:
    found = ElementwiseKernels.load(torch.bfloat16)
    assert found is not None, "the kernels must build here, or nothing is tested"
    return found


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= TOLERANCE[found.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 7, 400])
def test_kernels_equal_their_definition(dtype: torch.dtype, size: int, rows: int) -> None:
    kernels = ElementwiseKernels.load(dtype)
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
    # Memory layout in attention modules: (tokens, heads, dim) in memory, viewed as (1, heads, tokens, dim).
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


def prepared(name: str, model: PreTrainedModel | None = None) -> LoadedModel:
    torch.manual_seed(0)
    attention = PagedAttention(attention_backend)
    model = model or AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    model.set_attn_implementation(attention_implementation())
    return prepare(model, attention, torch.float32)


def counts(loaded: LoadedModel) -> dict[str, tuple[int, int]]:
    return {layers.kind: (layers.fused, layers.total) for layers in loaded.fused_layers}


def assert_computes_the_same(loaded: LoadedModel) -> None:
    sizes: dict[str, Any] = {"block_size": 16, "num_blocks": 8, "max_num_seqs": 4, "max_model_len": 64}
    runner = ModelRunner(loaded, **sizes)
    found = difference(loaded.reference, runner, keep_way(runner, "modules"), Capacity(**sizes))
    assert found is not None
    assert found < 1e-4


@pytest.mark.parametrize(
    ("name", "norms", "mlps", "attentions"),
    [
        ("llama", 7, 3, 3),
        ("qwen2", 7, 3, 3),
        ("qwen3", 13, 3, 3),
        ("mistral", 7, 3, 3),
        ("gemma2", 13, 0, 3),
        ("gemma3", 19, 0, 3),
        ("olmo2", 13, 3, 3),
        ("phi3", 7, 0, 3),
        ("qwen3_moe", 13, 0, 3),
        ("gpt2", 0, 0, 0),
        ("gpt_oss", 7, 0, 0),
    ],
)
def test_parts_are_found_by_what_they_compute(name: str, norms: int, mlps: int, attentions: int) -> None:
    """Gemma's MLP has another activation, GPT-OSS has attention sinks: both keep their own code there."""
    loaded = prepared(name)
    modules = list(loaded.model.modules())
    found = [sum(isinstance(part, kind) for part in modules) for kind in (FusedRMSNorm, FusedGatedMLP, FusedAttention)]
    assert found == [norms, mlps, attentions]
    fused = {layers.kind: layers.fused for layers in loaded.fused_layers}
    assert fused == {"norm": norms, "gated_mlp": mlps, "attention": attentions}
    assert all(bool(layers.reason) == (layers.fused < layers.total) for layers in loaded.fused_layers)
    assert_computes_the_same(loaded)


USUAL = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "fastserve-demo"]
GELU = {"gemma2", "gemma3"}
"""Their MLPs use other activations than SiLU; the whole-step kernel fuses them."""


@pytest.mark.parametrize("name", USUAL)
def test_the_usual_models_are_fused_in_all_their_parts(
    name: str, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    """If a library release keeps a layer from being recognised, that costs speed and must not go unnoticed."""
    path = str(demo_model_path()) if name == "fastserve-demo" else tiny_models.path(name)
    config = EngineConfig(model_dir=path, device="cpu", dtype="float32", max_num_seqs=4, max_total_tokens=2048)
    with caplog.at_level(logging.INFO, "fastserve.engine.build"):
        info = build_core(config, lambda *_: None).info
    for layers in info.fused_layers:
        assert str(layers) in caplog.messages
        assert layers.total > 0
        if layers.kind != "gated_mlp" or name not in GELU:
            assert layers.fused == layers.total, str(layers)
    assert [layers.kind for layers in info.fused_layers] == ["norm", "gated_mlp", "attention", "whole_step"]


def test_a_model_of_another_build_is_reported_with_the_reasons(
    tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(model_dir=tiny_models.path("gpt2"), device="cpu", dtype="float32", max_total_tokens=512)
    with caplog.at_level(logging.INFO, "fastserve.engine.build"):
        build_core(config, lambda *_: None)
    assert "norm: 0 of 7 fused (LayerNorm is not a plain RMS norm)" in caplog.messages
    assert any(line.startswith("attention: 0 of 3 fused (GPT2Attention ") for line in caplog.messages)
    assert any(line.startswith("whole step: 0 of 1 fused (") for line in caplog.messages)


def test_the_library_itself_stays_as_it_is() -> None:
    theirs = dict(vars(modeling_llama))
    forward = modeling_llama.LlamaAttention.forward
    loaded = prepared("llama")
    assert counts(loaded)["attention"] == (3, 3)
    assert dict(vars(modeling_llama)) == theirs
    assert modeling_llama.LlamaAttention.forward is forward


def subclassed(change: Callable[[type[torch.nn.Module]], type[torch.nn.Module]]) -> PreTrainedModel:
    """A Llama whose attention layers are of another class."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    other = change(modeling_llama.LlamaAttention)
    for layer in model.model.layers:
        layer.self_attn.__class__ = other
    return model


def test_attention_is_found_however_its_forward_is_wrapped() -> None:
    """As releases of transformers do to rename arguments."""

    def wrapped(base: Any) -> Any:
        @functools.wraps(base.forward)
        def forward(*args: Any, **named: Any) -> Any:
            return base.forward(*args, **named)

        return type("Renamed", (base,), {"forward": forward})

    loaded = prepared("llama", subclassed(wrapped))
    assert counts(loaded)["attention"] == (3, 3)
    assert_computes_the_same(loaded)


def scale_far_queries(layer: Any, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return query * (1.0 + 0.1 * (positions // 100)).unsqueeze(-1)


CHANGES: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "scales": lambda layer, query, positions: query * 1.001,
    "clips": lambda layer, query, positions: query.clamp(-100.0, 100.0),
    "scales far positions": scale_far_queries,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_attention_that_does_more_to_its_queries_is_left_alone(change: str) -> None:
    def changed(base: Any) -> Any:
        def forward(self: Any, hidden_states: torch.Tensor, position_ids: Any = None, **named: Any) -> Any:
            project = self.q_proj.forward
            self.q_proj.forward = lambda x: CHANGES[change](self, project(x), position_ids)
            try:
                return base.forward(self, hidden_states, position_ids=position_ids, **named)
            finally:
                del self.q_proj.forward

        return type("Changed", (base,), {"forward": forward})

    loaded = prepared("llama", subclassed(changed))
    [attention] = [layers for layers in loaded.fused_layers if layers.kind == "attention"]
    assert (attention.fused, attention.total) == (0, 3)
    assert attention.reason == "Changed computes the query differently from its projection"
    assert_computes_the_same(loaded)


def test_attention_that_does_more_to_its_output_is_left_alone() -> None:
    def changed(base: Any) -> Any:
        def forward(self: Any, *args: Any, **named: Any) -> Any:
            out, weights = base.forward(self, *args, **named)
            return out * 2, weights

        return type("Changed", (base,), {"forward": forward})

    loaded = prepared("llama", subclassed(changed))
    assert counts(loaded)["attention"] == (0, 3)
    assert loaded.fused_layers[2].reason == "Changed changes the result of the output projection"
    assert_computes_the_same(loaded)


def test_a_norm_that_does_more_is_left_alone(kernels: ElementwiseKernels) -> None:
    class OtherRMSNorm(modeling_llama.LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x) * 1.1
            return out

    model = torch.nn.Sequential(OtherRMSNorm(32), modeling_llama.LlamaRMSNorm(32)).requires_grad_(False)
    found = fuse_norms(model, kernels)
    assert str(found) == "norm: 1 of 2 fused (OtherRMSNorm is not a plain RMS norm)"
    assert isinstance(model[1], FusedRMSNorm)
    assert isinstance(model[0], OtherRMSNorm)


def test_a_norm_whose_epsilon_was_renamed_is_reported(kernels: ElementwiseKernels) -> None:
    norm = modeling_llama.LlamaRMSNorm(32).requires_grad_(False)
    del norm.variance_epsilon
    found = fuse_norms(torch.nn.Sequential(norm), kernels)
    assert str(found) == "norm: 0 of 1 fused (LlamaRMSNorm has no epsilon)"


def test_without_kernels_the_report_says_so() -> None:
    model = torch.nn.Sequential(modeling_llama.LlamaRMSNorm(32))
    assert str(fuse_norms(model, None)) == "norm: 0 of 1 fused (there are no kernels for this device)"


class CostlyWeight(torch.nn.Module):  # type: ignore[misc]
    @property
    def weight(self) -> torch.Tensor:
        raise AssertionError("a packed weight was made whole")


def test_norms_are_found_without_making_other_weights(kernels: ElementwiseKernels) -> None:
    assert fuse_norms(torch.nn.Sequential(CostlyWeight()), kernels).total == 0
