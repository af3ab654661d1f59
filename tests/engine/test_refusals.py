"""The check at start: it sees the model's own logits, refuses what would be served wrongly, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    OlmoConfig,
    Phi3Config,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from fastserve.engine.build import build_core
from fastserve.engine.core import EngineCore
from fastserve.engine.kernels.elementwise import ElementwiseKernels
from fastserve.engine.runner.attention import PagedAttention
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError

from .conftest import SHAPE, TinyModels


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
    ],
    ids=["cohere", "cohere2", "olmo", "phi3-partial"],
)
def test_unusual_models_are_served_rightly(config: PretrainedConfig, dtype: str, tmp_path: Path) -> None:
    assert start(save(config, tmp_path), dtype).info.dtype == dtype


def test_wrong_attention_is_found(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PagedAttention.__call__

    def wrong(self: PagedAttention, *args: Any, **named: Any) -> Any:
        return right(self, *args, **{**named, "sliding_window": 3})

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


def test_models_that_cannot_be_paged_are_refused(tmp_path: Path) -> None:
    bloom = BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(StartupError, match="BloomForCausalLM cannot be served: its code in transformers"):
        start(save(bloom, tmp_path / "bloom"))
    T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)) \
        .save_pretrained(tmp_path / "t5")  # fmt: skip
    with pytest.raises(StartupError, match="encoder-decoder"):
        start(str(tmp_path / "t5"))


def test_a_model_that_fails_when_tried_is_a_sentence(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PagedAttention, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(PagedAttention, "__call__", fail)
    with pytest.raises(StartupError, match=r"LlamaForCausalLM cannot be served: its code failed .*no such thing"):
        start(tiny_models.path("llama"))


def test_longrope_ends_where_its_short_form_does(tmp_path: Path) -> None:
    """Beyond that, a long request would change the answers of the short ones beside it."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = Phi3Config(**{**SHAPE, "max_position_embeddings": 256}, rope_parameters=rope)
    config.original_max_position_embeddings = 64
    assert start(save(config, tmp_path)).info.max_model_len == 64
