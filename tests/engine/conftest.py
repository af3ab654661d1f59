"""Tiny models of real architectures with random weights, made once in a test run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

# Two threads gain nothing on models this small, and lose much beside other processes.
torch.set_num_threads(1)

SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Large weights make the likeliest token clear, so that rounding cannot turn the order of two tokens.
    "initializer_range": 0.25,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "mistral": MistralConfig(**SHAPE, sliding_window=12),
    "gemma2": Gemma2Config(**SHAPE, head_dim=12, sliding_window=8, final_logit_softcapping=30.0),
    "gpt2": GPT2Config(
        vocab_size=160, n_embd=48, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1,
        initializer_range=0.25,
    ),
    "gpt_oss": GptOssConfig(**SHAPE, head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
}  # fmt: skip


class TinyModels:
    """Writes models to disk on demand, and answers with transformers' own generate."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, PreTrainedModel] = {}

    def path(self, name: str) -> str:
        path = self._folder / name
        if not path.exists():
            torch.manual_seed(sorted(CONFIGS).index(name))
            AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).save_pretrained(path)
        return str(path)

    def reference(self, path: str, prompt_ids: list[int], max_tokens: int, eos_token_ids: list[int]) -> list[int]:
        """The greedy answer of transformers for the same weights, its end token included."""
        if path not in self._models:
            self._models[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        output = self._models[path].generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=eos_token_ids or -1,
            pad_token_id=1,
        )
        answer: list[int] = output[0, len(prompt_ids) :].tolist()
        return answer


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))
