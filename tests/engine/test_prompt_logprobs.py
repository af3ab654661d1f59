"""Logprobs of the prompt are those of transformers' own forward pass, however the prompt is cut and scheduled."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastserve.engine.contract import EngineRequest, SamplingParams, TokenLogprob
from fastserve.engine.core import EngineCore

from .conftest import TinyModels
from .test_engine_equality import make_core, random_prompt


def collect(core: EngineCore) -> dict[str, list[list[TokenLogprob] | None]]:
    """Prompt logprobs of each output, by request."""
    found: dict[str, list[list[TokenLogprob] | None]] = {}
    while core.has_work:
        for output in core.step():
            assert output.token_ids
            found.setdefault(output.request_id, []).append(output.prompt_logprobs)
        core.scheduler.check()
    return found


def expected(path: str, prompt: list[int]) -> torch.Tensor:
    """Log probabilities (tokens - 1, vocabulary) of what follows each token but the last."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs: torch.Tensor = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    return logprobs


def check(found: list[TokenLogprob], prompt: list[int], logprobs: torch.Tensor, num_top: int) -> None:
    assert [item.token_id for item in found] == prompt[1:]
    own = logprobs.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
    assert [item.logprob for item in found] == pytest.approx(own.tolist(), abs=1e-3)
    values, ids = logprobs.topk(num_top, dim=-1)
    assert [[token for token, _ in item.top] for item in found] == ids.tolist()
    for item, row in zip(found, values.tolist(), strict=True):
        assert [value for _, value in item.top] == pytest.approx(row, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_alone_and_in_company(tiny_models: TinyModels, name: str) -> None:
    """In small chunks, with preemption, beside others whose prompts begin alike and are cached."""
    path = tiny_models.path(name)
    rng = random.Random(0)
    # After the wide core come a small budget, few rows of logits in a step, and a pool that is too small for all.
    small = make_core(path, block_size=4, max_num_batched_tokens=13, max_total_tokens=112, max_model_len=100)
    small.scheduler.max_extra_rows = 5
    shared = random_prompt(rng, 160) + [rng.randrange(160) for _ in range(20)]
    prompts = [shared + random_prompt(rng, 160) for _ in range(4)] + [random_prompt(rng, 160), [7, 8]]
    for core in (make_core(path), small):
        for index, prompt in enumerate(prompts):
            for kind, num_logprobs in (("scored", 2), ("plain", None)):
                params = SamplingParams(12, temperature=0.0, prompt_logprobs=num_logprobs)
                core.add(EngineRequest(f"{kind}{index}", prompt, params))
        found = collect(core)
        for index, prompt in enumerate(prompts):
            first, *later = found[f"scored{index}"]
            assert first is not None
            check(first, prompt, expected(path, prompt), 2)
            assert later == [None] * len(later)
            assert set(map(type, found[f"plain{index}"])) == {type(None)}
    assert small.scheduler.preemptions > 0
    assert small.scheduler.cached_tokens > 0


def test_a_prompt_of_one_token_has_none_and_top_zero_has_no_top(tiny_models: TinyModels) -> None:
    core = make_core(tiny_models.path("llama"))
    core.add(EngineRequest("one", [5], SamplingParams(2, prompt_logprobs=3)))
    core.add(EngineRequest("bare", [5, 6, 7], SamplingParams(2, prompt_logprobs=0)))
    found = collect(core)
    assert found["one"][0] == []
    bare = found["bare"][0]
    assert bare is not None
    assert [(item.token_id, item.top) for item in bare] == [(6, []), (7, [])]


def test_rows_of_logits_are_bounded_by_the_vocabulary(tiny_models: TinyModels) -> None:
    """A long prompt is cut into as many steps as its logits need memory."""
    core = make_core(tiny_models.path("llama"), max_num_batched_tokens=200)
    core.scheduler.max_extra_rows = 10
    core.add(EngineRequest("r", list(range(2, 102)), SamplingParams(1, prompt_logprobs=0)))
    found = collect(core)
    assert core.stats.steps == 10
    assert [len(item or []) for item in found["r"]] == [99]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_hits_up_to_each_side_of_a_blocks_end_give_the_same_logits(tiny_models: TinyModels, name: str) -> None:
    """The next token's logprobs are those of the prompt without a hit, to the bit."""
    path = tiny_models.path(name)
    rng = random.Random(5)
    text = [rng.randrange(2, 160) for _ in range(40)]
    params = SamplingParams(1, temperature=0.0, logprobs=20)

    def next_logprobs(core: EngineCore, request: EngineRequest) -> tuple[TokenLogprob, int]:
        core.add(request)
        [output] = [output for _ in range(10) if core.has_work for output in core.step()]
        assert output.logprobs is not None
        return output.logprobs[0], output.num_cached_tokens

    warm = make_core(path, block_size=16)
    next_logprobs(warm, EngineRequest("first", text, params))
    for length in (15, 16, 17, 18, 31, 32, 33, 34):
        cold = make_core(path, block_size=16, no_prefix_cache=True)
        expected, none = next_logprobs(cold, EngineRequest("cold", text[:length], params))
        found, num_cached = next_logprobs(warm, EngineRequest(f"{length}", text[:length], params))
        assert (none, num_cached) == (0, (length - 1) // 16 * 16)
        assert found == expected
