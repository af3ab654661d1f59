"""GGUF files without anything beside them: the model that their metadata describes is the one that was written."""

from __future__ import annotations

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
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastserve.engine.loading.loader import LoadedModel, load_model
from fastserve.engine.settings import WeightOptions
from fastserve.errors import StartupError
from fastserve.worker.model_source import find_model
from tests.gguf.writing import add_tokens

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
        case "granite":
            writer.add_embedding_scale(config.embedding_multiplier)
            writer.add_residual_scale(config.residual_multiplier)
            writer.add_attention_scale(config.attention_multiplier)
            writer.add_logit_scale(config.logits_scaling)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
SIX_LAYERS = {**SIZES, "num_hidden_layers": 6, "head_dim": 16}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases and its own head": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "llama 3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama 3.1 with a larger base": LlamaConfig(**SIZES, rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "llama with YaRN": LlamaConfig(**SIZES, rope_parameters=YARN),
    "qwen2": Qwen2Config(**SIZES, rms_norm_eps=1e-6),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SIX_LAYERS, sliding_window=8, query_pre_attn_scalar=16,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "phi3": Phi3Config(**SIZES, sliding_window=8),
    "phi3 with LongRoPE": Phi3Config(**SIZES, rope_parameters=LONG, original_max_position_embeddings=64),
    "smollm3": SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
    "granite": GraniteConfig(
        **SIZES, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=2.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_model_in_the_metadata_is_the_one_that_was_written(tmp_path: Path, name: str) -> None:
    kind = name.split()[0]
    expected = write_gguf(save(MODELS[name], tmp_path / "plain"), tmp_path / "alone", kind, "Q8_0", describe)
    assert not (tmp_path / "alone" / "config.json").exists()
    assert_same_logits(load(tmp_path / "alone"), expected)


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
