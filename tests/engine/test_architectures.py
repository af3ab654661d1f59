"""Every architecture through the real core: each step's logits and greedy tokens are those of the model's own forward.

Requests run in one batch, prompts are cut into chunks, prefixes are shared and blocks run out; what is compared with
is one forward pass of transformers, eager attention and no cache, over each whole sequence.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Ministral3Config, PretrainedConfig

from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, FusedLayers, SamplingParams, TokenLogprob
from fastserve.engine.core import EngineCore
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError

from .conftest import CONFIGS, SHAPE, TinyModels

VOCABULARY = 160
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.3] * 6, "long_factor": [4.0] * 6, "factor": 2.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip


def start(path: str, **settings: Any) -> EngineCore:
    config = EngineConfig(model_dir=path, device="cpu", dtype="float32", max_num_seqs=16, **settings)
    return build_core(config, lambda *_: None)


def run(core: EngineCore, requests: list[EngineRequest]) -> dict[str, list[TokenLogprob]]:
    """Logprobs of the tokens of each request."""
    logprobs: dict[str, list[TokenLogprob]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert core.add(request) is None
    while core.has_work:
        for output in core.step():
            assert output.logprobs is not None
            logprobs[output.request_id] += output.logprobs
        core.scheduler.check()
    return logprobs


def assert_equals_own_forward(
    path: str, requests: list[EngineRequest], logprobs: dict[str, list[TokenLogprob]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    for request in requests:
        answer = logprobs[request.request_id]
        assert len(answer) == request.params.max_tokens
        whole = torch.tensor([request.prompt_ids + [token.token_id for token in answer]])
        with torch.inference_mode():
            own = model(input_ids=whole, use_cache=False).logits[0].log_softmax(dim=-1)
        for position, token in enumerate(answer, start=len(request.prompt_ids) - 1):
            found = torch.full((VOCABULARY,), math.nan)
            for token_id, logprob in token.top:
                found[token_id] = logprob
            assert (found - own[position]).abs().max() < 2e-3, f"{request.request_id}, position {position}"
            assert token.token_id == int(own[position].argmax())


def requests_for(rng: random.Random, longest: int) -> list[EngineRequest]:
    """Prompts of 1 to `longest` tokens, most of which begin alike; all logits are asked for, as logprobs."""
    shared = [rng.randrange(2, VOCABULARY) for _ in range(longest)]
    lengths = [1, 2, 15, 16, 17, 30, 40, longest - 24, longest]
    prompts = [
        shared[: rng.randint(0, length)] + [rng.randrange(2, VOCABULARY) for _ in range(length)] for length in lengths
    ]
    return [
        EngineRequest(f"r{index}", prompt[:length], SamplingParams(24, temperature=0.0, logprobs=VOCABULARY))
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


@pytest.mark.parametrize("block_size", [16, pytest.param(4, marks=pytest.mark.slow)], ids=["kernel", "torch"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_equal_the_models_own(tiny_models: TinyModels, name: str, block_size: int) -> None:
    """In batches with chunked prefill, prefix hits and preemption."""
    path = tiny_models.path(name)
    # Drafts would depend on how fast steps are, and with them who is preempted.
    sizes = {"max_num_batched_tokens": 23, "max_total_tokens": 112, "max_model_len": 96}
    core = start(path, block_size=block_size, speculative_method="off", **sizes)
    requests = requests_for(random.Random(7), 70)
    # Twice: what the first round has computed is found by the second.
    for _ in range(2):
        assert_equals_own_forward(path, requests, run(core, requests))
    assert core.scheduler.preemptions > 0
    assert core.scheduler.cached_tokens > 0


def save(config: PretrainedConfig, folder: Path) -> str:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", list(ROPES))
def test_scaled_rope_equals_the_models_own(name: str, tmp_path: Path) -> None:
    """Up to the last position of the context, beside short sequences, which must not change with it."""
    path = save(LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 10000.0, **ROPES[name]}), tmp_path)
    plain = save(LlamaConfig(**SHAPE), tmp_path / "plain")
    core = start(path, max_num_batched_tokens=64, max_total_tokens=1024)
    assert core.info.max_model_len == 256
    # Sequences that cross LongRoPE's switch of frequencies are in test_positions.py.
    requests = requests_for(random.Random(5), 128 - 24 if name == "longrope" else 256 - 24)
    logprobs = run(core, requests)
    assert_equals_own_forward(path, requests, logprobs)
    if name != "dynamic":  # which is plain up to the length it was trained for
        with pytest.raises(AssertionError):
            assert_equals_own_forward(plain, requests, logprobs)


def test_queries_that_are_scaled_at_far_positions_equal_the_models_own(tmp_path: Path) -> None:
    """The short prompts of the check at start do not reach these; the trial of the attention layers does."""
    rope = {**ROPES["yarn"], "type": "yarn", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.5}
    path = save(Ministral3Config(**SHAPE, head_dim=12, rope_parameters=rope), tmp_path)
    core = start(path, max_num_batched_tokens=64, max_total_tokens=1024, max_model_len=160)
    assert FusedLayers("attention", 3, 3) not in core.info.fused_layers
    requests = requests_for(random.Random(5), 130)
    assert_equals_own_forward(path, requests, run(core, requests))


def test_rope_whose_keys_change_with_each_token_ends_where_it_begins_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers takes the base of the longest sequence so far for new tokens, and leaves older keys as they are."""
    path = save(LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 10000.0, **ROPES["dynamic"]}), tmp_path)
    with pytest.raises(StartupError, match=r"--max-model-len 257 exceeds .* 256 tokens"):
        start(path, max_total_tokens=1024, max_model_len=257)
    assert start(path, max_total_tokens=1024, max_model_len=256).info.max_model_len == 256
    assert "Context of 256 tokens: beyond it, dynamic NTK" in caplog.text


@pytest.mark.parametrize(("stated", "context"), [(32, 128), (128, 128), (64, 64)])
def test_yarn_stretches_the_context(stated: int, context: int, tmp_path: Path) -> None:
    """A model whose settings were given YaRN by hand states the length it was trained for; others the stretched one."""
    rope = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": stated}, rope_parameters=rope)
    assert start(save(config, tmp_path), max_total_tokens=1024).info.max_model_len == context


def test_max_model_len_within_and_beyond_the_context(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    core = start(path, max_total_tokens=1024, max_model_len=40)
    assert core.info.max_model_len == 40
    fits = EngineRequest("fits", [5] * 30, SamplingParams(10, temperature=0.0, logprobs=0))
    assert len(run(core, [fits])["fits"]) == 10
    refused = core.add(EngineRequest("long", [5] * 31, SamplingParams(10)))
    assert refused is not None
    assert refused.error is not None
    assert "31 tokens" in refused.error
    assert "(40 tokens)" in refused.error
    with pytest.raises(StartupError, match="--max-model-len 300 exceeds the model's context of 256 tokens"):
        start(path, max_total_tokens=1024, max_model_len=300)
    with pytest.raises(StartupError, match="--max-model-len 0 is out of range"):
        start(path, max_total_tokens=1024, max_model_len=0)
