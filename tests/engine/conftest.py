"""Tiny models of real architectures with random weights, made once in a test run."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

from fastserve.engine import build, devices
from fastserve.engine.contract import SamplingParams
from fastserve.engine.loading.loader import LoadedModel
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.runner.forward.forward_pass import ForwardPass
from fastserve.engine.runner.runner import ModelRunner

# Two threads gain nothing on models this small, and lose much beside other processes.
torch.set_num_threads(1)

# A device is one file: those that only tests have lie beside them.
devices.__path__.append(str(Path(__file__).with_name("extra_devices")))

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
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=12),
    "gemma3": Gemma3TextConfig(
        **SHAPE, head_dim=12, query_pre_attn_scalar=12, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": Phi3Config(**SHAPE),
    "gpt_neox": GPTNeoXConfig(**{**SHAPE, "num_key_value_heads": 4}, rotary_pct=0.5),
    "olmo2": Olmo2Config(**SHAPE),
    "opt": OPTConfig(
        vocab_size=160, hidden_size=48, word_embed_proj_dim=48, ffn_dim=96, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        init_std=0.25,
    ),
    "starcoder2": Starcoder2Config(**SHAPE, sliding_window=12),
}  # fmt: skip


class TinyModels:
    """Writes models to disk on demand, and answers with transformers' own generate."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, PreTrainedModel] = {}

    def path(self, name: str) -> str:
        path = self._folder / name
        if not path.exists():
            torch.manual_seed(zlib.crc32(name.encode()))
            AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).save_pretrained(path)
        return str(path)

    def reference(
        self,
        path: str,
        prompt_ids: list[int],
        max_tokens: int,
        eos_token_ids: list[int],
        guess: list[int] | None = None,
    ) -> list[int]:
        """The greedy answer of transformers for the same weights, its end token included.

        A right `guess` saves time: one forward pass of transformers shows that greedy decoding gives just that.
        """
        if path not in self._models:
            self._models[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if guess and self._is_greedy(self._models[path], prompt_ids, guess, max_tokens, eos_token_ids):
            return guess
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

    @staticmethod
    def _is_greedy(
        model: PreTrainedModel, prompt_ids: list[int], answer: list[int], max_tokens: int, eos_token_ids: list[int]
    ) -> bool:
        has_end = answer[-1] in eos_token_ids or len(answer) == max_tokens
        if not has_end or any(token_id in eos_token_ids for token_id in answer[:-1]):
            return False
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt_ids + answer]), use_cache=False).logits[0]
        likeliest: list[int] = logits[len(prompt_ids) - 1 : -1].argmax(dim=-1).tolist()
        return likeliest == answer


def plain(path: str | Path, **settings: Any) -> PreTrainedModel:
    """transformers' own model of a folder, which may be written anew afterwards."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **settings).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # it may have been mapped from the file
    return model


def keep_way(runner: ModelRunner, name: str) -> ForwardPass:
    """Have a runner compute steps this way only."""
    passes = runner.forward_passes
    for way in [way for way in passes.ways if way.name != name]:
        passes.drop(way, "this way is not what is tested")
    return passes.ways[0]


def logits_of(loaded: LoadedModel, token_ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) of one sequence, computed module by module in one step."""
    count = len(token_ids)
    runner = ModelRunner(loaded, num_blocks=8, block_size=16, max_num_seqs=1, max_model_len=128)
    keep_way(runner, "modules")
    new = NewSequence(0, token_ids, count, SamplingParams(max_tokens=1), 0)
    chunk = Chunk(0, 0, count, list(range(-(-count // 16))), sample=False, score_begin=0, score_end=count)
    return runner.forward(StepPlan([], [new], [chunk]))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture
def no_start_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores are built without comparing each forward pass, which takes long where kernels are interpreted."""
    monkeypatch.setattr(build, "check_model", lambda *_: None)
