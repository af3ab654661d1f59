"""The check at start: it sees the model's own logits, refuses what would be served wrongly, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    GPTJConfig,
    JambaConfig,
    Lfm2Config,
    LlamaForCausalLM,
    MambaConfig,
    MptConfig,
    OlmoConfig,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from fastserve.engine.attention.paged import PagedAttention
from fastserve.engine.build import build_core
from fastserve.engine.core import EngineCore
from fastserve.engine.kernels.elementwise import ElementwiseKernels
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError

from .conftest import SHAPE, TinyModels
from .test_architectures import assert_equals_own_forward, requests_for, run

MLA: dict[str, Any] = {
    **SHAPE, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.25
}  # fmt: skip


def save(config: PretrainedConfig, folder: Path) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # A norm that subtracts the mean must not look like one that does not.
        model.get_input_embeddings().weight.add_(0.4)
    model.save_pretrained(folder)
    return str(folder)


def start(path: str, dtype: str = "float32", **settings: Any) -> EngineCore:
    config = EngineConfig(model_dir=path, device="cpu", dtype=dtype, max_total_tokens=1024, **settings)
    return build_core(config, lambda *_: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SHAPE),  # a LayerNorm without bias, with the attributes of an RMS norm
        Cohere2Config(**SHAPE),
        OlmoConfig(**SHAPE),  # keeps cos and sin in float32
        Phi3Config(**SHAPE, partial_rotary_factor=0.5),  # turns a part of each head only
        OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),  # norms over all heads together
        DeepseekV2Config(**MLA, q_lora_rank=None),  # values are shorter than keys
        DeepseekV3Config(**MLA, q_lora_rank=16, n_shared_experts=1),
    ],
    ids=["cohere", "cohere2", "olmo", "phi3-partial", "olmoe", "deepseek-v2", "deepseek-v3"],
)
def test_unusual_models_are_served_rightly(config: PretrainedConfig, dtype: str, tmp_path: Path) -> None:
    assert start(save(config, tmp_path), dtype).info.dtype == dtype


def test_wrong_attention_is_found(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PagedAttention.__call__

    def wrong(self: PagedAttention, *args: Any, **named: Any) -> Any:
        return right(self, *args, **{**named, "scaling": 2 * named["scaling"]})

    monkeypatch.setattr(PagedAttention, "__call__", wrong)
    with pytest.raises(StartupError, match="LlamaForCausalLM cannot be served: the engine's logits differ"):
        start(tiny_models.path("llama"))


def test_wrong_fusion_is_found(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ElementwiseKernels.rms_norm
    calls = []

    def wrong(self: ElementwiseKernels, *args: Any) -> torch.Tensor:
        calls.append(1)
        out = right(self, *args)
        return out if len(calls) < 3 else out * 1.01  # right while it is tried

    monkeypatch.setattr(ElementwiseKernels, "rms_norm", wrong)
    with pytest.raises(StartupError, match="logits differ"):
        start(tiny_models.path("llama"))


REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "mamba": (MambaConfig(vocab_size=160, hidden_size=48, num_hidden_layers=2, state_size=8), "keep a state"),
    "jamba": (JambaConfig(**SHAPE, num_experts=2, attn_layer_period=2, attn_layer_offset=1), "keep a state"),
    "lfm2": (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention", "conv"]), r"its layers \(conv\) keep a state"),
    "qwen3-next": (
        Qwen3NextConfig(**SHAPE, num_experts=2, moe_intermediate_size=16), r"its layers \(linear_attention\) keep"
    ),
    "recurrent-gemma": (  # by its layer types, where the release names them
        RecurrentGemmaConfig(**SMALL, lru_width=48, attention_window_size=16),
        r"(its layers \(linear_attention\) keep|its code in transformers does not let)",
    ),
    # Attention that looks ahead.
    "bert": (BertConfig(**SMALL, intermediate_size=96), "the mask of its attention is neither causal"),
    "contradictory": (DeepseekV3Config(**{**MLA, "num_key_value_heads": 2}, q_lora_rank=16), "its own code fails"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_cannot_be_paged_are_refused(name: str, tmp_path: Path) -> None:
    config, words = REFUSED[name]
    with pytest.raises(StartupError, match=rf"^\S+ cannot be served: .*{words}"):
        start(save(config, tmp_path))


OWN_ATTENTION = {
    "bloom": BloomConfig(vocab_size=160, hidden_size=32, n_layer=1, n_head=4),
    "mpt": MptConfig(vocab_size=160, d_model=32, n_layers=1, n_heads=4),
    "falcon-alibi": FalconConfig(**SMALL, alibi=True),
    "falcon": FalconConfig(**SMALL, alibi=False),
    "gptj": GPTJConfig(vocab_size=160, n_embd=48, n_layer=2, n_head=4, rotary_dim=8),
}
"""Models whose code in some release of transformers keeps its attention to itself."""


@pytest.mark.parametrize("name", list(OWN_ATTENTION))
def test_models_with_attention_of_their_own_are_refused_or_served_rightly(name: str, tmp_path: Path) -> None:
    """A release of transformers may learn to replace it: then they are served, and the check at start has seen their
    logits. Without a word and wrongly they are served by none."""
    path = save(OWN_ATTENTION[name], tmp_path)
    try:
        core = start(path)
    except StartupError as error:
        assert "does not let the engine replace its attention" in str(error)  # noqa: PT017  # one of two outcomes
    else:
        requests = requests_for(random.Random(3), 70)
        assert_equals_own_forward(path, requests, run(core, requests))


def test_a_model_that_says_that_its_attention_is_its_own_is_refused(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    with pytest.raises(
        StartupError, match=r"^LlamaForCausalLM cannot be served: its code in transformers does not let"
    ):
        start(tiny_models.path("llama"))


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)) \
        .save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(StartupError, match="encoder-decoder"):
        start(str(tmp_path))


def test_a_model_that_fails_when_tried_is_a_sentence(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PagedAttention, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(PagedAttention, "__call__", fail)
    with pytest.raises(StartupError, match=r"LlamaForCausalLM cannot be served: its code failed .*no such thing"):
        start(tiny_models.path("llama"))
