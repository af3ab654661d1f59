"""The start check catches wrong ways to compute a model, and passes right ones.

Each mutation makes one thing wrong in kernels, layers or the description of a model, as a mistake of ours or a release
of transformers would.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    PretrainedConfig,
    SmolLM3Config,
)

from fastserve.engine.attention.cpu_backend import CpuAttention
from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.kernels.decoder import DecoderStruct
from fastserve.engine.kernels.paged_attention import PagedAttentionKernel
from fastserve.engine.layers import fused_attention
from fastserve.engine.layers.experts import Experts
from fastserve.engine.layers.fused_attention import FusedAttention
from fastserve.engine.layers.fusion import FusedGatedMLP, FusedRMSNorm
from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.loading import small_twin
from fastserve.engine.loading.loader import LoadedModel, prepare
from fastserve.engine.runner.forward.modules import ModulesForward
from fastserve.engine.runner.forward.whole_step import WholeStepForward
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck import twin, verify
from fastserve.engine.selfcheck.compare import Capacity
from fastserve.engine.selfcheck.verify import check_model
from fastserve.errors import StartupError

from .conftest import CONFIGS as COMMON
from .conftest import SHAPE

BLOCK_SIZE = 16
LONG = {**SHAPE, "max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
CONFIGS: dict[str, PretrainedConfig] = {
    **{name: COMMON[name] for name in ("qwen2", "qwen3", "mistral", "gemma2", "gpt_oss", "gpt_neox", "phi3")},
    "qwen3_moe": COMMON["qwen3_moe"],
    "llama": LlamaConfig(**LONG),
    "llama_yarn": LlamaConfig(**LONG, rope_parameters=YARN),
    "gemma3": Gemma3TextConfig(
        **{**LONG, "num_hidden_layers": 6}, head_dim=12, query_pre_attn_scalar=12, sliding_window=1024,
        sliding_window_pattern=6,
    ),
    "smollm3": SmolLM3Config(**{**LONG, "num_hidden_layers": 4}),
    "ministral3": Ministral3Config(
        **LONG, head_dim=12, rope_parameters={**YARN, "type": "yarn", "llama_4_scaling_beta": 0.5}
    ),
}  # fmt: skip
Mutate = Callable[[pytest.MonkeyPatch], None]


def load(config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(attention_implementation())
    return prepare(model, PagedAttention(attention_backend), dtype)


def ways_left(loaded: LoadedModel) -> list[str]:
    """Ways that pass the check. Raises StartupError when none does."""
    capacity = Capacity(BLOCK_SIZE, 16, 16, loaded.context_length)
    runner = ModelRunner(
        loaded, block_size=BLOCK_SIZE, num_blocks=16, max_num_seqs=16, max_model_len=loaded.context_length
    )
    check_model(loaded, runner, capacity)
    return [way.name for way in runner.forward_passes.ways]


def is_caught(config: PretrainedConfig, way: str) -> bool:
    try:
        return way not in ways_left(load(config))
    except StartupError as error:
        return "the engine's logits differ from those of the model's own code" in str(error)


# ---- mutations ------------------------------------------------------------------------------------------------------


def attention(change: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]]) -> Mutate:
    """Attention of the modules with other inputs."""
    call = CpuAttention.__call__

    def changed(self: CpuAttention, step: Any, query: Any, key: Any, value: Any, cache: Any, params: Any) -> Any:
        query, key, value, params = change(query, key, value, params)
        return call(self, step, query, key, value, cache, params)

    return lambda patch: patch.setattr(CpuAttention, "__call__", changed)


def params(**changes: Callable[[Any], Any]) -> Mutate:
    """Attention with other settings, where a layer has them."""

    def change(query: Any, key: Any, value: Any, given: Any) -> Any:
        values = {
            name: change(getattr(given, name)) for name, change in changes.items() if getattr(given, name) is not None
        }
        return query, key, value, dataclasses.replace(given, **values)

    return attention(change)


def kernel_step(**changes: Callable[[Any], Any]) -> Mutate:
    """The kernel's form of a step, in all ways, with other arrays."""
    make_step = PagedAttentionKernel.make_step
    names = ("starts", "counts", "positions", "block_table", "token_block", "token_offset")

    def changed(self: PagedAttentionKernel, *arrays: Any) -> Any:
        given = dict(zip(names, arrays, strict=False))
        given.update({name: np.ascontiguousarray(change(given[name])) for name, change in changes.items()})
        return make_step(self, **given, group=arrays[-1])

    return lambda patch: patch.setattr(PagedAttentionKernel, "make_step", changed)


def description(change: Callable[[DecoderStruct], None]) -> Mutate:
    """The description that the whole-step kernel follows."""
    describe = WholeStepForward._describe

    def changed(self: WholeStepForward, *args: Any) -> None:
        describe(self, *args)
        change(self._struct)

    return lambda patch: patch.setattr(WholeStepForward, "_describe", changed)


def setting(name: str, value: float) -> Mutate:
    return description(lambda struct: setattr(struct, name, value))


def layer_setting(name: str, value: Callable[[int], int]) -> Mutate:
    def change(struct: DecoderStruct) -> None:
        for index in range(struct.num_layers):
            setattr(struct.layers[index], name, value(getattr(struct.layers[index], name)))

    return description(change)


def swapped(first: str, second: str) -> Mutate:
    def change(struct: DecoderStruct) -> None:
        for index in range(struct.num_layers):
            layer = struct.layers[index]
            one, other = getattr(layer, first), getattr(layer, second)
            setattr(layer, first, other)
            setattr(layer, second, one)

    return description(change)


def final_norm_of_a_layer(struct: DecoderStruct) -> None:
    struct.norm = struct.layers[0].mlp_norm


def first_layer_cache(struct: DecoderStruct) -> None:
    struct.layers[1].keys = struct.layers[0].keys


def method(owner: type, name: str, change: Callable[[Any], Any]) -> Mutate:
    return lambda patch: patch.setattr(owner, name, change(getattr(owner, name)))


def fused(change: Mutate) -> Mutate:
    """A mutation of fused attention, which is used without its trial."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(fused_attention, "_require_same", lambda *_: None)
        change(patch)

    return apply


def interleaved(_: Any) -> Any:
    def rotated(self: Any, x: torch.Tensor, norm: Any, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, (-1, self._dim)).transpose(1, 2)
        half = cos.shape[-1] // 2
        cos, sin = (table[..., :half].repeat_interleave(2, dim=-1).unsqueeze(1) for table in (cos, sin))
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + turned * sin

    return rotated


def moved_decodes(call: Any) -> Any:
    def changed(self: Any, step: PackedStep) -> torch.Tensor:
        moved = step.positions + np.repeat(step.metadata.counts == 1, step.metadata.counts)
        result: torch.Tensor = call(self, dataclasses.replace(step, positions=moved))
        return result

    return changed


def near_only(call: Any) -> Any:
    def changed(self: Any, step: PackedStep) -> torch.Tensor:
        result: torch.Tensor = call(self, dataclasses.replace(step, positions=step.positions % 256))
        return result

    return changed


def heads_mixed(query: Any, key: Any, value: Any, given: Any) -> Any:
    return query[:, [0, 2, 1, 3]], key, value, given


def last_key_missing(query: Any, key: Any, value: Any, given: Any) -> Any:
    return query, torch.cat([key[:-1], torch.zeros_like(key[-1:])]), value, given


def no_bias(layout: Any) -> Any:
    def changed(self: WholeStepForward, weight: WeightLayout, bias: torch.Tensor | None) -> Any:
        return layout(self, weight, None)

    return changed


def more_weight(forward: Any) -> Any:
    return lambda self, x, index, weights: forward(self, x, index, weights * 1.25)


def other_experts(forward: Any) -> Any:
    return lambda self, x, index, weights: forward(self, x, (index + 1) % self.num_experts, weights)


def plus_input(forward: Any) -> Any:
    return lambda self, x: forward(self, x) + x


def without_weight(forward: Any) -> Any:
    return lambda self, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@dataclass(frozen=True)
class Mutation:
    model: str
    way: str
    apply: Mutate


ROTATED_OTHERWISE = fused(method(FusedAttention, "_rotated", interleaved))
MUTATIONS = {
    "window dropped": Mutation("gemma3", "modules", params(window=lambda _: None)),
    "window one too long": Mutation("mistral", "modules", params(window=lambda window: window + 1)),
    "window one too short": Mutation("gpt_oss", "modules", params(window=lambda window: window - 1)),
    "soft cap dropped": Mutation("gemma2", "modules", params(softcap=lambda _: None)),
    "scores scaled otherwise": Mutation("llama", "modules", params(scaling=lambda scaling: scaling * 1.01)),
    "sinks ignored": Mutation("gpt_oss", "modules", params(sinks=lambda _: None)),
    "query heads mixed": Mutation("llama", "modules", attention(heads_mixed)),
    "last key missing": Mutation("phi3", "modules", attention(last_key_missing)),
    "block table shifted": Mutation("llama", "modules", kernel_step(block_table=lambda table: np.roll(table, 1, 1))),
    "blocks of another sequence": Mutation(
        "gpt_neox", "modules", kernel_step(block_table=lambda table: np.roll(table, 1, axis=0))
    ),
    "slot one too far": Mutation("llama", "modules", kernel_step(token_offset=lambda slot: (slot + 1) % BLOCK_SIZE)),
    "context one too short": Mutation(
        "llama", "modules", kernel_step(positions=lambda positions: np.maximum(positions - 1, 0))
    ),
    "rotary embedding interleaved": Mutation("llama", "modules", ROTATED_OTHERWISE),
    "query norm dropped": Mutation(
        "qwen3", "modules", fused(lambda patch: patch.setattr(FusedAttention, "norms", (None, None)))
    ),
    "query scale by position dropped": Mutation("ministral3", "modules", fused(lambda _: None)),
    "query scale by position not in the description": Mutation("ministral3", "whole_step", fused(lambda _: None)),
    "positions of decodes one too far": Mutation("llama", "modules", method(ModulesForward, "__call__", moved_decodes)),
    "far positions wrapped": Mutation("llama_yarn", "whole_step", method(WholeStepForward, "__call__", near_only)),
    "routing weights not normalised": Mutation("qwen3_moe", "modules", method(Experts, "forward", more_weight)),
    "tokens sent to other experts": Mutation("gpt_oss", "modules", method(Experts, "forward", other_experts)),
    "residual added twice": Mutation("llama", "modules", method(FusedGatedMLP, "forward", plus_input)),
    "norm without weight": Mutation("qwen2", "modules", method(FusedRMSNorm, "forward", without_weight)),
    "biases missing": Mutation("qwen2", "whole_step", method(WholeStepForward, "_layout", no_bias)),
    "norms swapped": Mutation("llama", "whole_step", swapped("attention_norm", "mlp_norm")),
    "query and key norms swapped": Mutation("qwen3", "whole_step", swapped("query_norm", "key_norm")),
    "final norm of a layer": Mutation("llama", "whole_step", description(final_norm_of_a_layer)),
    "gate and up swapped": Mutation("llama", "whole_step", swapped("gate", "up")),
    "cosines and sines swapped": Mutation("llama", "whole_step", swapped("cos", "sin")),
    "two layers with one cache": Mutation("llama", "whole_step", description(first_layer_cache)),
    "windows not in the description": Mutation("gemma3", "whole_step", layer_setting("window", lambda _: 0)),
    "described window one too long": Mutation(
        "gemma2", "whole_step", layer_setting("window", lambda window: window and window + 1)
    ),
    "activation swapped": Mutation("llama", "whole_step", setting("activation", 1)),
    "embedding scale dropped": Mutation("gemma2", "whole_step", setting("embedding_scale", 1.0)),
    "norm offset dropped": Mutation("gemma2", "whole_step", setting("norm_offset", 0.0)),
    "soft cap not in the description": Mutation("gemma2", "whole_step", setting("softcap", 0.0)),
    "soft cap of logits dropped": Mutation("gemma2", "whole_step", setting("logit_softcap", 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_a_wrong_way_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    mutation = MUTATIONS[name]
    mutation.apply(monkeypatch)
    assert is_caught(CONFIGS[mutation.model], mutation.way)
    assert "fail" not in caplog.text, "it must be its results that give it away"


@pytest.mark.parametrize("name", list(CONFIGS))
def test_right_ways_pass(name: str) -> None:
    loaded = load(CONFIGS[name])
    ways = ways_left(loaded)
    assert "modules" in ways
    described = {mutation.model for mutation in MUTATIONS.values() if mutation.way == "whole_step"} - {"ministral3"}
    assert ("whole_step" in ways) == (name in described | {"mistral"})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted({*CONFIGS, *COMMON}))
def test_right_ways_pass_whatever_the_weights(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS.get(name) or COMMON[name]
    for seed in range(20):
        assert "modules" in ways_left(load(config, dtype, seed))


@pytest.mark.parametrize("multiplier", ["embedding_multiplier", "residual_multiplier", "logits_scaling"])
def test_what_a_model_computes_between_its_modules_is_not_described(multiplier: str) -> None:
    assert ways_left(load(GraniteConfig(**SHAPE, **{multiplier: 0.5}))) == ["modules"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_without_rotary_embedding_do_not_get_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of four is of this kind; in the serving dtype of the model itself it hardly shows."""
    config = CONFIGS["smollm3"]
    assert [bool(rotates) for rotates in config.no_rope_layers] == [True, True, True, False]
    assert ways_left(load(config, dtype)) == ["modules"]
    fused(lambda _: None)(monkeypatch)
    with pytest.raises(StartupError, match="its small twin computes something else"):
        ways_left(load(config, dtype))


DEEPSEEK = DeepseekV3Config(
    **{**SHAPE, "num_hidden_layers": 5, "num_key_value_heads": 4}, first_k_dense_replace=3, n_routed_experts=8,
    n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
MANY = Gemma3TextConfig(
    **{**SHAPE, "num_hidden_layers": 14}, head_dim=12, sliding_window=64,
    layer_types=["sliding_attention"] * 13 + ["full_attention"],
)  # fmt: skip


@pytest.mark.parametrize(("config", "num_layers"), [(DEEPSEEK, 4), (MANY, 2), (CONFIGS["gemma3"], 6)])
def test_the_twin_has_a_layer_of_each_kind(config: PretrainedConfig, num_layers: int) -> None:
    loaded = load(config)
    found = twin.make_twin(loaded, loaded.context_length)
    assert found.has_all_kinds
    assert found.loaded.model.config.num_hidden_layers == num_layers
    assert len(set(found.loaded.reference.layer_kinds)) == 2


def test_without_a_twin_the_model_itself_is_checked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(config: PretrainedConfig, layers: Any, **_: Any) -> PretrainedConfig:
        config = LlamaConfig(**{**SHAPE, "vocab_size": 2})  # its own code fails
        return config

    monkeypatch.setattr(small_twin, "small_config", broken)
    assert ways_left(load(CONFIGS["llama"])) == ["modules"]
    assert "No small twin of LlamaForCausalLM can be made, so only the model itself is checked: " in caplog.text
    assert (
        "LlamaForCausalLM: the forward pass by whole_step is not used: no small twin of it can be made" in caplog.text
    )
    MUTATIONS["residual added twice"].apply(monkeypatch)
    assert is_caught(CONFIGS["llama"], "modules")


def test_far_positions_of_the_model_itself_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> twin.Twin:
        raise twin.NoTwinError("not today")

    monkeypatch.setattr(verify, "make_twin", none)
    fused(lambda _: None)(monkeypatch)
    with pytest.raises(StartupError, match="Ministral3ForCausalLM cannot be served: the engine's logits differ"):
        ways_left(load(CONFIGS["ministral3"]))


@pytest.mark.parametrize("on_twin", [True, False])
def test_a_way_that_fails_is_dropped_with_a_line_in_the_log(
    on_twin: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(CONFIGS["llama"])
    call = WholeStepForward.__call__

    def failing(self: WholeStepForward, step: PackedStep) -> torch.Tensor:
        if on_twin == (self._attention is not loaded.attention):
            raise KeyError("moon")
        return call(self, step)

    monkeypatch.setattr(WholeStepForward, "__call__", failing)
    with caplog.at_level(logging.WARNING):
        assert ways_left(loaded) == ["modules"]
    assert "the forward pass by whole_step is not used: it" in caplog.text
    assert "fails: 'moon'" in caplog.text
