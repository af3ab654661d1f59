"""The kernel of whole steps on models that are divided over ranks, which are threads here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from fastserve.engine.contract import SamplingParams
from fastserve.engine.loading.loader import load_model
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.ranks.collectives import SINGLE_RANK, Collectives, RankLostError
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
from fastserve.engine.runner.runner import ModelRunner

from .conftest import SHAPE, TinyModels, keep_way

MORE: dict[str, PretrainedConfig] = {
    "tied, odd vocabulary": Qwen2Config(**{**SHAPE, "vocab_size": 157}, tie_word_embeddings=True),
    "a bias everywhere in attention": LlamaConfig(**SHAPE, attention_bias=True),
    "fewer KV heads than ranks": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
}
NAMES = ("llama", "qwen3", "mistral", "gemma2", *MORE)
PROMPTS = [list(range(3, 30)), [7, 90, 44], [151] * 20]


def save(config: PretrainedConfig, folder: Path) -> str:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # of zeros at first
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return str(folder)


def make_runner(path: str, collectives: Collectives) -> ModelRunner:
    loaded = load_model(
        path, "cpu", "float32", trust_remote_code=False, progress=lambda *_: None, collectives=collectives
    )
    return ModelRunner(loaded, num_blocks=16, block_size=16, max_num_seqs=4, max_model_len=64)


def logits(path: str, collectives: Collectives, *, slot_is_small: bool = False) -> torch.Tensor:
    """Logits after prompts in one batch, the last of them in two chunks, and of a token after each."""
    runner = make_runner(path, collectives)
    if not slot_is_small:
        keep_way(runner, "whole_step")
    params = SamplingParams(max_tokens=1)
    new = [NewSequence(i, prompt, len(prompt), params, 0) for i, prompt in enumerate(PROMPTS)]
    blocks = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(len(PROMPTS))]
    counts = [len(PROMPTS[0]), len(PROMPTS[1]), 6]
    first = [Chunk(i, 0, count, blocks[i], sample=i < 2) for i, count in enumerate(counts)]
    found = [runner.forward(StepPlan([], new, first)).clone()]
    for i in range(2):
        runner.correct(i, counts[i], [11 + i])
    rest = len(PROMPTS[2]) - 6
    then = [Chunk(i, counts[i], 1, [], sample=True, num_held_blocks=3) for i in range(2)]
    then.append(Chunk(2, 6, rest, [], sample=True, num_held_blocks=3, score_begin=8, score_end=12))
    found.append(runner.forward(StepPlan([], [], then)).clone())
    return torch.cat(found)


def on_ranks(size: int, work: Callable[[Collectives], torch.Tensor], slot_bytes: int = 1 << 20) -> list[torch.Tensor]:
    segment = Segment.create(size, slot_bytes)
    ranks = [SharedMemoryCollectives.load(segment, rank, 30.0) for rank in range(size)]
    if any(rank is None for rank in ranks):
        pytest.skip("no C++ compiler")
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [rank for rank in ranks if rank is not None]))


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_divided_model_equal_those_of_the_whole(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    path = save(MORE[name], tmp_path) if name in MORE else tiny_models.path(name)
    expected = logits(path, SINGLE_RANK)
    for size in (2, 3) if name in ("llama", "fewer KV heads than ranks") else (2,):
        found = on_ranks(size, lambda collectives: logits(path, collectives))
        assert all(torch.equal(one, found[0]) for one in found), "ranks must hold the same bits"
        assert torch.allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def test_a_step_that_does_not_fit_the_shared_memory_is_computed_by_modules(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    expected = logits(path, SINGLE_RANK)
    for found in on_ranks(2, lambda collectives: logits(path, collectives, slot_is_small=True), slot_bytes=4096):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_step_whose_peer_is_gone_raises(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")

    plan = StepPlan([], [NewSequence(0, [5, 6], 2, SamplingParams(1), 0)], [Chunk(0, 0, 2, [0], sample=True)])

    def work(collectives: Collectives) -> torch.Tensor:
        runner = make_runner(path, collectives)
        keep_way(runner, "whole_step")
        if collectives.rank == 0:
            assert isinstance(collectives, SharedMemoryCollectives)
            collectives.set_timeout(0.2)
            with pytest.raises(RankLostError, match="did not answer"):
                runner.forward(plan)
        return torch.empty(0)

    on_ranks(2, work)
