"""GGUF files without anything beside them: the model that their metadata describes is the one that was written."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.models.granitemoe import modeling_granitemoe
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastserve.engine.build import build_rank
from fastserve.engine.layers.experts import Experts
from fastserve.engine.layers.layouts.packed import GroupedWeight
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.loading.formats.gguf import _maker, _stored
from fastserve.engine.loading.loader import LoadedModel, load_model
from fastserve.engine.ranks.collectives import SINGLE_RANK
from fastserve.engine.settings import EngineConfig, WeightOptions
from fastserve.errors import StartupError
from fastserve.gguf.file import read_gguf
from fastserve.worker.model_source import find_draft_model, find_model
from tests.gguf.writing import add_tokens, write_header

from .conftest import logits_of
from .test_formats import SIZES, assert_same_logits, save, write_gguf


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(file: Path) -> LoadedModel:
    source = find_model(str(file), "main")
    return load_model(
        str(source.folder), "cpu", "float32", trust_remote_code=False, progress=lambda *_: None,
        options=WeightOptions(gguf_file=str(source.gguf_file)),
    )  # fmt: skip


def describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """What llama.cpp's converter writes of a model's config.json."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        for field, add in (
            ("moe_intermediate_size", writer.add_expert_feed_forward_length),
            ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
            ("shared_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ):
            if hasattr(config, field):
                add(getattr(config, field))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    tokens = ["a", "b", "ab", *(f"t{index}" for index in range(config.vocab_size - 3))]
    add_tokens(writer, "gpt2", tokens, merges=["a b"], pre="gpt-2")
    add_own(writer, config, rope)


def add_own(writer: gguf.GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    """What only some models have."""
    match rope["rope_type"]:
        case "llama3":
            plain = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters={**rope, "rope_type": "default"}))
            scaled = LlamaRotaryEmbedding(config)
            writer.add_tensor("rope_freqs.weight", (plain.inv_freq / scaled.inv_freq).numpy())
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if "beta_fast" in rope:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
                writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
            if "attention_factor" in rope:
                usual = 0.1 * np.log(rope["factor"]) + 1
                writer.add_rope_scaling_attn_factors(rope["attention_factor"] / usual)
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
            for name in ("long", "short"):
                writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], dtype=np.float32))
    match config.model_type:
        case "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        case "ministral3":
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
            writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        case "granite" | "granitemoe" | "granitemoeshared":
            writer.add_embedding_scale(config.embedding_multiplier)
            writer.add_residual_scale(config.residual_multiplier)
            writer.add_attention_scale(config.attention_multiplier)
            writer.add_logit_scale(config.logits_scaling)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if getattr(config, "sliding_window", None) and "sliding_attention" in types:
        writer.add_sliding_window(config.sliding_window)
        if config.model_type in ("qwen2", "qwen3") or types[0] == "full_attention":
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in types])


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
MINISTRAL = {
    **YARN,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "llama_4_scaling_beta": 0.2,
}
"""The prompts go beyond the original length."""
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0}
SIX_LAYERS = {**SIZES, "num_hidden_layers": 6, "head_dim": 16}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases and its own head": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "llama 3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama 3.1 with a larger base": LlamaConfig(**SIZES, rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "llama with YaRN": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama 3.1 with a higher low_freq_factor": LlamaConfig(
        **SIZES, rope_parameters={**LLAMA3, "low_freq_factor": 3.0, "high_freq_factor": 8.0}
    ),
    "llama with YaRN of its own": LlamaConfig(
        **SIZES, rope_parameters={**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}
    ),
    "llama with a linear factor": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama with a window (Mistral)": MistralConfig(**SIZES, head_dim=32, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, rms_norm_eps=1e-6),
    "qwen2 with windows and its own head": Qwen2Config(
        **SIZES, head_dim=32, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "qwen3 with windows and a tied head": Qwen3Config(
        **SIZES, head_dim=16, use_sliding_window=True, sliding_window=8, tie_word_embeddings=True,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "qwen3 with biases": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SIX_LAYERS, sliding_window=8, query_pre_attn_scalar=16, rope_parameters=GEMMA3_ROPE
    ),
    "gemma3 with its own pattern": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3}, head_dim=16, sliding_window=4, query_pre_attn_scalar=16,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"], rope_parameters=GEMMA3_ROPE,
    ),
    "gemma3 without windows": Gemma3TextConfig(
        **SIZES, head_dim=16, query_pre_attn_scalar=16, layer_types=["full_attention"] * 2, rope_parameters=GEMMA3_ROPE,
    ),
    "phi3": Phi3Config(**SIZES, sliding_window=8),
    "phi3 with LongRoPE": Phi3Config(**SIZES, rope_parameters=LONG, original_max_position_embeddings=64),
    "smollm3": SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
    "smollm3 with YaRN and an untied head": SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 4}, tie_word_embeddings=False, rope_parameters=YARN
    ),
    "granite with biases": GraniteConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, attention_multiplier=0.25
    ),
    "granite": GraniteConfig(**SIZES, **GRANITE),
    "mistral3": Ministral3Config(**SIZES, head_dim=32, rope_parameters=MINISTRAL),
    "mistral3 without scaled queries (Mistral Small 3)": MistralConfig(**SIZES, head_dim=32, sliding_window=None),
    "llama with experts (Mixtral)": MixtralConfig(**SIZES, **LOCAL_EXPERTS),
    "llama with experts and a window": MixtralConfig(**SIZES, **LOCAL_EXPERTS, head_dim=32, sliding_window=8),
    "qwen2moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=64),
    "qwen2moe with a tied head": Qwen2MoeConfig(
        **SIZES, **EXPERTS, shared_expert_intermediate_size=32, tie_word_embeddings=True, qkv_bias=False
    ),
    "qwen3moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32, norm_topk_prob=True, rope_parameters=YARN),
    "olmoe": OlmoeConfig(**SIZES, num_experts=5, num_experts_per_tok=3),
    "granitemoe": GraniteMoeConfig(**SIZES, **LOCAL_EXPERTS, **GRANITE),
    "granitemoe with a shared expert": GraniteMoeSharedConfig(
        **SIZES, **LOCAL_EXPERTS, **GRANITE, shared_intermediate_size=64, tie_word_embeddings=True
    ),
}  # fmt: skip


def config_of(name: str) -> tuple[str, Any]:
    """The architecture in llama.cpp's words, and the configuration. Skips what this transformers computes otherwise."""
    kind = name.split()[0]
    if kind == "granitemoe" and not hasattr(modeling_granitemoe, "GraniteMoeExperts"):
        pytest.skip("this release of transformers lets no other code compute Granite's experts")
    return kind, MODELS[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_in_the_metadata_is_the_one_that_was_written(tmp_path: Path, name: str) -> None:
    kind, config = config_of(name)
    expected = write_gguf(save(config, tmp_path / "plain"), tmp_path / "alone", kind, "F32", describe)
    assert not (tmp_path / "alone" / "config.json").exists()
    assert_same_logits(load(tmp_path / "alone"), expected, tolerance=2e-5)


@pytest.mark.parametrize("kind", ["llama", "smollm3", "granite"])
def test_packed_rows_are_put_in_order(tmp_path: Path, kind: str) -> None:
    expected = write_gguf(save(MODELS[kind], tmp_path / "plain"), tmp_path / "alone", kind, "Q8_0", describe)
    assert_same_logits(load(tmp_path / "alone"), expected)


@pytest.mark.parametrize("quantization", ["BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["llama with experts (Mixtral)", "qwen2moe", "granitemoe with a shared expert"])
def test_quantized_experts_stay_quantized(tmp_path: Path, name: str, quantization: str) -> None:
    kind, config = config_of(name)
    expected = write_gguf(save(config, tmp_path / "plain"), tmp_path / "alone", kind, quantization, describe)
    loaded = load(tmp_path / "alone")
    assert_same_logits(loaded, expected)
    layouts = [
        type(layout)
        for module in loaded.model.modules() if isinstance(module, Experts)
        for layouts in module.layouts.values() for layout in layouts
    ]  # fmt: skip
    assert len(layouts) == 2 * 5 * 2
    assert set(layouts) == ({GroupedWeight} if quantization == "BF16" else {QuantizedWeight})


def rewrite(file: Path, change: Callable[[str, np.ndarray], list[tuple[str, np.ndarray]]]) -> None:
    """Change the tensors of a file of Mixtral, and leave its metadata as they are."""
    tensors = [(tensor.name, np.array(tensor.data)) for tensor in gguf.GGUFReader(file).tensors]

    def add(writer: gguf.GGUFWriter) -> None:
        describe(writer, MODELS["llama with experts (Mixtral)"])
        for name, values in tensors:
            for new_name, new_values in change(name, values):
                writer.add_tensor(new_name, new_values)

    write_header(file, "llama", add)


def one_for_each_expert(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if "_exps" not in name:
        return [(name, values)]
    return [(name.replace("_exps", f".{expert}"), matrix) for expert, matrix in enumerate(values)]


def one_for_gates_and_ups(name: str, values: np.ndarray, gates: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    if "ffn_gate_exps" in name or "ffn_up_exps" in name:
        layer = name.split("ffn_")[0]
        other = gates.setdefault(layer, values)
        if other is values:
            return []
        gate, up = (other, values) if "ffn_up_exps" in name else (values, other)
        return [(f"{layer}ffn_gate_up_exps.weight", np.concatenate([gate, up], axis=1))]
    return [(name, values)]


def test_experts_in_other_tensors(tmp_path: Path) -> None:
    """Old files have one for each expert, new ones may have one for all gates and ups."""
    source = save(MODELS["llama with experts (Mixtral)"], tmp_path / "plain")
    for change in (one_for_each_expert, partial(one_for_gates_and_ups, gates={})):
        expected = write_gguf(source, tmp_path / "alone", "llama", "F32", describe)
        rewrite(tmp_path / "alone" / "model.gguf", change)
        assert_same_logits(load(tmp_path / "alone"), expected, tolerance=2e-5)


def one_expert_less(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(name, values[:-1] if name == "blk.1.ffn_up_exps.weight" else values)]


def without_up(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [] if name == "blk.1.ffn_up_exps.weight" else [(name, values)]


def flat(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(name, values.reshape(-1, values.shape[-1]) if name == "blk.1.ffn_up_exps.weight" else values)]


def narrow(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(name, values[:, :-1].copy() if name == "blk.1.ffn_up_exps.weight" else values)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_expert_less, r"layers\.1\.mlp\.experts"),
        (without_up, r"layers\.1\.mlp\.experts"),
        (flat, r"the tensor blk\.1\.ffn_up_exps\.weight of all experts has the shape \(480, 64\)"),
        (narrow, r"layers\.1\.mlp\.experts"),
    ],
)
def test_experts_that_do_not_fit_together_are_refused(
    tmp_path: Path, change: Callable[[str, np.ndarray], list[tuple[str, np.ndarray]]], message: str
) -> None:
    source = save(MODELS["llama with experts (Mixtral)"], tmp_path / "plain")
    write_gguf(source, tmp_path / "alone", "llama", "F32", describe)
    rewrite(tmp_path / "alone" / "model.gguf", change)
    with pytest.raises(StartupError, match=message):
        load(tmp_path / "alone")


def write_llama(folder: Path, add: Callable[[gguf.GGUFWriter], None], config: Any = None) -> PreTrainedModel:
    """A small Llama with more metadata."""

    def describe_and_add(writer: gguf.GGUFWriter, config: Any) -> None:
        describe(writer, config)
        add(writer)

    source = save(config or LlamaConfig(**SIZES), folder / "plain")
    return write_gguf(source, folder / "alone", "llama", "F32", describe_and_add)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rope_factor_without_a_type_is_linear(tmp_path: Path, key: str) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_float32(f"llama.{key}", 4.0)

    write_llama(tmp_path, add)
    linear = LlamaForCausalLM.from_pretrained(tmp_path / "plain", rope_parameters=LINEAR, dtype=torch.float32).eval()
    assert_same_logits(load(tmp_path / "alone"), linear, tolerance=2e-5)


KEYS_THAT_LEAVE_THE_MODEL_AS_IT_IS: dict[str, Any] = {
    "llama.vocab_size": 160, "llama.expert_count": 0, "llama.attention.sliding_window": 0, "llama.logit_scale": 1.0,
    "llama.attention.max_alibi_bias": 0.0, "llama.rope.scaling.type": "none", "llama.rope.scaling.finetuned": True,
    "llama.attention.causal": True, "llama.nextn_predict_layers": 0, "llama.tensor_data_layout": "Meta AI original pth",
    "llama.rope.scaling.attn_factor": 1.0, "general.type": "model", "other.attention.scale": 3.0,
}  # fmt: skip


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def test_keys_that_leave_the_model_as_it_is(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in KEYS_THAT_LEAVE_THE_MODEL_AS_IT_IS.items():
            add_key(writer, key, value)

    expected = write_llama(tmp_path, add)
    assert_same_logits(load(tmp_path / "alone"), expected, tolerance=2e-5)


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("llama", "llama.attention.scale", 0.5, "'llama.attention.scale' is '0.5', which is not served"),
        ("llama", "llama.final_logit_softcapping", 30.0, "'llama.final_logit_softcapping' is"),
        ("llama", "llama.nextn_predict_layers", 1, "'llama.nextn_predict_layers' is '1'"),
        ("llama", "llama.invented_by_somebody", [0, 3], "'llama.invented_by_somebody' is"),
        ("llama", "llama.attention.causal", False, "its attention is not causal"),
        ("llama", "llama.rope.scaling.type", "ntk", "rope.scaling.type 'ntk' is not served"),
        ("llama", "llama.rope.scaling.type", "longrope", "has no tensor rope_factors_long.weight"),
        ("llama", "llama.attention.sliding_window_pattern", [True, False], "'llama.attention.sliding_window_pattern'"),
        ("llama", "general.type", "adapter", "is no model, but of the type 'adapter'"),
        ("llama 3.1", "llama.rope.scaling.type", "yarn", "'yarn' contradicts its tensor rope_freqs"),
        ("llama with YaRN", "llama.rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor 0.5 is not served"),
        ("llama with YaRN", "llama.rope.scaling.yarn_log_multiplier", 0.1, "yarn_log_multiplier' is"),
        ("qwen2", "qwen2.attention.sliding_window", 8, "does not say for which layers"),
        ("qwen3", "qwen3.attn_logit_softcapping", 50.0, "'qwen3.attn_logit_softcapping' is"),
        ("gemma3", "gemma3.attention.sliding_window_pattern", [True, False], "has 2 entries, and the model 6 layers"),
        ("gemma2", "gemma2.attention.scale", 0.5, "'gemma2.attention.scale' is"),
        ("smollm3", "smollm3.attention.sliding_window", 8, "'smollm3.attention.sliding_window' is '8'"),
        ("granite", "granite.rope.scaling.finetuned", False, "without rotary positions"),
        ("llama with experts", "llama.expert_gating_func", 2, "expert_gating_func is '2', which is not served"),
        ("llama with experts", "llama.expert_weights_scale", 2.5, "'llama.expert_weights_scale' is '2.5'"),
        ("qwen2moe", "qwen2moe.expert_weights_norm", True, "expert_weights_norm is 'True', which is not served"),
        ("qwen3moe", "qwen3moe.leading_dense_block_count", 1, "'qwen3moe.leading_dense_block_count' is '1'"),
        ("olmoe", "olmoe.attention.clamp_kqv", 8.0, "'olmoe.attention.clamp_kqv' is '8.0'"),
        ("qwen3", "qwen3.expert_count", 8, "a mixture of experts, which is not served for the architecture qwen3"),
        ("mistral3", "mistral3.attention.temperature_length", 9, "'mistral3.attention.temperature_length' is '9'"),
        ("mistral3 without", "mistral3.attention.temperature_scale", 0.1, "there is no YaRN scaling of positions"),
        ("phi3", "phi3.attention.key_length_swa", 64, "'phi3.attention.key_length_swa' is"),
    ],
)  # fmt: skip
def test_a_key_that_changes_the_model_otherwise_is_refused(
    tmp_path: Path, kind: str, key: str, value: Any, message: str
) -> None:
    config = next(config for name, config in MODELS.items() if name.startswith(kind))

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("token_embd.weight", np.zeros((160, 64), np.float32))
        describe(writer, config)
        add_key(writer, key, value)

    write_header(tmp_path / "model.gguf", kind.split()[0], add)
    with pytest.raises(StartupError, match=re.escape(message)):
        find_model(str(tmp_path), "main")


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("token_embd.weight", np.zeros((150, 64), np.float32))
        describe(writer, MODELS["llama"])

    write_header(tmp_path / "model.gguf", "llama", add)
    with pytest.raises(StartupError, match="has 160 tokens, and embeddings of 150"):
        find_model(str(tmp_path), "main")


def test_a_model_in_parts(tmp_path: Path) -> None:
    expected = write_gguf(save(LlamaConfig(**SIZES), tmp_path / "plain"), tmp_path / "alone", "llama", "F16", describe)
    whole = gguf.GGUFReader(tmp_path / "alone" / "model.gguf")
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(2):
        writer = gguf.GGUFWriter(parts / f"model-{number + 1:05}-of-00002.gguf", "llama")
        if number == 0:
            describe(writer, expected.config)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in whole.tensors[number::2]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert_same_logits(load(parts), expected)
    assert_same_logits(load(parts / "model-00002-of-00002.gguf"), expected)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    def with_another(writer: gguf.GGUFWriter, config: Any) -> None:
        describe(writer, config)
        writer.add_tensor("blk.1.attn_sinks.weight", torch.ones(4).numpy())

    write_gguf(save(LlamaConfig(**SIZES), tmp_path / "plain"), tmp_path / "alone", "llama", "F16", with_another)
    with pytest.raises(StartupError, match=r"holds the tensor blk\.1\.attn_sinks\.weight, for which the model of its"):
        load(tmp_path / "alone")


def test_a_gguf_file_as_draft_model(tmp_path: Path) -> None:
    """The engine loads it with the weights in the file."""
    write_gguf(save(LlamaConfig(**SIZES), tmp_path / "plain"), tmp_path / "alone", "llama", "F32", describe)
    file = tmp_path / "alone" / "model.gguf"
    source = find_draft_model(str(file))
    assert source == find_model(str(file), "main")
    assert source.gguf_file == file
    config = EngineConfig(
        model_dir=str(source.folder), weights=WeightOptions(gguf_file=str(file)), device="cpu", dtype="float32",
        speculative_model_dir=str(source.folder), speculative_gguf_file=str(file), max_num_seqs=2,
    )  # fmt: skip
    draft = build_rank(config, lambda *_: None, (), SINGLE_RANK).draft
    assert draft is not None
    tokens = list(range(2, 19))
    torch.testing.assert_close(logits_of(draft, tokens), logits_of(load(file), tokens))


def test_a_gguf_file_with_other_tokens_is_no_draft_model(tmp_path: Path) -> None:
    """Beside a folder of safetensors, whose embeddings are of the same size."""
    source = save(LlamaConfig(**SIZES), tmp_path / "plain")
    write_gguf(source, tmp_path / "alone", "llama", "F32", describe)
    draft = find_draft_model(str(tmp_path / "alone" / "model.gguf"))
    tokenizer = json.loads((draft.folder / "tokenizer.json").read_text())

    def start() -> None:
        config = EngineConfig(
            model_dir=source, device="cpu", dtype="float32", max_num_seqs=2,
            speculative_model_dir=str(draft.folder), speculative_gguf_file=str(draft.gguf_file),
        )  # fmt: skip
        build_rank(config, lambda *_: None, (), SINGLE_RANK)

    file = Path(source) / "tokenizer.json"
    file.write_text(json.dumps(tokenizer))
    start()
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["t1"], vocabulary["t2"] = vocabulary["t2"], vocabulary["t1"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(StartupError, match="a tokenizer with other tokens than the model's"):
        start()


BLOCK_TYPES = list(gguf.quants._type_traits)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=[kind.name for kind in BLOCK_TYPES])
def test_each_block_type_has_the_values_of_the_package(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Blocks of random bytes, also with scales that are not finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(kind.value).integers(0, 256, (40, 512 // block * size), dtype=np.uint8)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("token_embd.weight", rows, raw_dtype=kind)

    tensor = read_gguf(write_header(tmp_path / "model.gguf", "llama", add)).tensors["token_embd.weight"]
    assert tensor.shape == (40, 512)
    with np.errstate(all="ignore"):
        value = _maker(tensor, lambda weight: weight)(_stored(tensor, tensor.shape).read())
        found = value if isinstance(value, torch.Tensor) else value.dense(torch.float32)
        expected = gguf.quants.dequantize(rows, kind)
    np.testing.assert_array_equal(found.float().numpy(), expected)


@pytest.mark.parametrize(("number", "name"), [(36, "type 36"), (200, "type 200"), (15, "Q8_K"), (28, "F64")])
def test_a_block_type_that_cannot_be_read_is_named(tmp_path: Path, number: int, name: str) -> None:
    write_llama(tmp_path, lambda _: None)
    file = tmp_path / "alone" / "model.gguf"
    entry = b"blk.0.attn_q.weight" + struct.pack("<IQQ", 2, 64, 64)
    data = file.read_bytes()
    assert data.count(entry) == 1
    file.write_bytes(data.replace(entry + struct.pack("<I", 0), entry + struct.pack("<I", number)))
    with pytest.raises(StartupError, match=rf"the tensor blk\.0\.attn_q\.weight is .*{name}"):
        load(tmp_path / "alone")
