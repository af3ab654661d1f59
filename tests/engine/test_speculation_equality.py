"""With real models: speculation changes how many tokens a step brings, and never which."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from fastserve.demo import demo_model_path
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.speculation.draft_budget import DraftBudget
from fastserve.engine.speculation.ngram import NgramProposer
from fastserve.engine.speculation.speculator import PlaceholderProposer, Proposer, Speculator
from fastserve.errors import StartupError

from .conftest import TinyModels
from .test_engine_equality import EOS, Answer, make_core, random_prompt, run

KINDS = ("ngram", "random", "same model", "other model")


class RandomProposer:
    """Guesses of every length that are hardly ever right."""

    def __init__(self) -> None:
        self._rng = random.Random(0)

    def propose(self, seq_id: int, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        return [self._rng.randrange(160) for _ in range(self._rng.randint(0, max_drafts))]

    def expect(self, seq_id: int, predicted_ids: Sequence[int], num_prompt_tokens: int) -> None:
        pass

    def forget(self, seq_id: int) -> None:
        pass


def speculating_core(tiny_models: TinyModels, name: str, kind: str, **settings: Any) -> EngineCore:
    """A core that drafts as much as budget and blocks allow, because drafts seem to cost nothing."""
    if kind.endswith("model"):
        draft = name if kind == "same model" else "qwen2"
        settings["speculative_model_dir"] = tiny_models.path(draft)
    core = make_core(tiny_models.path(name), **settings)
    proposers: dict[str, Proposer] = {"ngram": NgramProposer(), "random": RandomProposer()}
    core._speculator = core.scheduler._drafting = eager(proposers.get(kind, PlaceholderProposer()))
    return core


def eager(proposer: Proposer) -> Speculator:
    return Speculator(proposer, DraftBudget(lambda _: 1.0), 6)


def mixed_requests(rng: random.Random, count: int) -> list[EngineRequest]:
    """Greedy and sampled, with everything that depends on the tokens so far, over prompts that share and repeat."""
    shared = random_prompt(rng, 160) * 2
    requests = []
    for index in range(count):
        prompt = (shared[: rng.randint(4, 24)] if rng.random() < 0.5 else []) + random_prompt(rng, 160, 12)
        kind = index % 4
        params = SamplingParams(
            rng.randint(1, 36),
            temperature=0.0 if kind == 0 else rng.choice([0.2, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            seed=index,
            repetition_penalty=1.2 if kind == 2 else 1.0,
            presence_penalty=0.8 if kind == 3 else 0.0,
            frequency_penalty=0.3 if kind == 3 else 0.0,
            # A few likely tokens make answers that prompt lookup can guess, sometimes rightly.
            logit_bias=dict.fromkeys(range(7, 10), 100.0 if kind == 0 else 2.0) if kind in (0, 2) else {},
            min_tokens=5 if kind == 1 else 0,
            stop_token_ids=(EOS, 9) if rng.random() < 0.5 else (),
            logprobs=2 if rng.random() < 0.4 else None,
            prompt_logprobs=1 if rng.random() < 0.2 else None,
        )
        requests.append(EngineRequest(f"r{index}", prompt, params, choice=index % 3, priority=rng.randint(0, 1)))
    return requests


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_random_mixtures_are_as_without_speculation(tiny_models: TinyModels, name: str, kind: str) -> None:
    """Chunked prefill, prefix hits, preemption and aborts at random; each answer as alone and without speculation."""
    rng = random.Random(5)
    requests = mixed_requests(rng, 32)
    plain = make_core(tiny_models.path(name), speculative_method="off")
    expected = {request.request_id: Answer() for request in requests}
    for request in requests:
        plain.add(request)
        run(plain, expected)
    assert plain.stats.draft_tokens == 0

    core = speculating_core(
        tiny_models, name, kind, block_size=4, max_num_batched_tokens=21, max_total_tokens=112, max_model_len=100
    )
    answers: dict[str, Answer] = {}
    logprobs: dict[str, list[int]] = {}
    aborted: set[str] = set()
    waiting = list(requests)
    while waiting or core.has_work:
        while waiting and rng.random() < 0.5:
            request = waiting.pop()
            answers[request.request_id] = Answer()
            logprobs[request.request_id] = []
            assert core.add(request) is None
        if answers and rng.random() < 0.02:
            victim = rng.choice(sorted(answers))
            if answers[victim].finish_reason is None:
                core.abort(victim)
                aborted.add(victim)
        for output in core.step():
            answer = answers[output.request_id]
            assert answer.finish_reason is None
            answer.token_ids += output.token_ids
            answer.finish_reason = output.finish_reason
            if output.logprobs is not None:
                logprobs[output.request_id] += [item.token_id for item in output.logprobs]
        core.scheduler.check()
    assert core.scheduler.preemptions > 0
    assert core.scheduler.cached_tokens > 0
    stats = core.stats
    assert stats.draft_tokens > 30
    if kind == "same model":
        assert stats.accepted_tokens > 0.95 * stats.draft_tokens
    else:
        assert (0 if kind == "ngram" else -1) < stats.accepted_tokens < stats.draft_tokens
    assert stats.num_used_blocks == 0
    for request in requests:
        answer, alone = answers[request.request_id], expected[request.request_id]
        if request.request_id in aborted:
            assert answer.token_ids == alone.token_ids[: len(answer.token_ids)]
        else:
            assert (answer.token_ids, answer.finish_reason) == (alone.token_ids, alone.finish_reason)
        if request.params.logprobs is not None:
            assert logprobs[request.request_id] == answer.token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_model_guesses_nearly_all_tokens_and_another_nearly_none(
    tiny_models: TinyModels, temperature: float
) -> None:
    """Also when tokens are sampled: the draft model samples with the same random numbers."""
    rates = {}
    for kind in ("same model", "other model"):
        core = speculating_core(tiny_models, "llama", kind)
        answers = {f"r{index}": Answer() for index in range(6)}
        rng = random.Random(2)
        for index, request_id in enumerate(answers):
            params = SamplingParams(40, temperature=temperature, seed=index)
            core.add(EngineRequest(request_id, random_prompt(rng, 160, 80), params))
        run(core, answers)
        assert all(len(answer.token_ids) == 40 for answer in answers.values())
        rates[kind] = core.stats.accepted_tokens / core.stats.draft_tokens
        if kind == "same model":
            assert core.stats.steps < 15
    assert rates["same model"] > 0.99
    assert rates["other model"] < 0.2


def test_a_draft_model_fills_what_a_prefix_hit_lacks(tiny_models: TinyModels) -> None:
    """The first request leaves blocks that the draft model never computed; the second takes them, and drafts well."""
    core = speculating_core(tiny_models, "llama", "same model", max_num_batched_tokens=40)
    speculator, core.scheduler._drafting = core.scheduler._drafting, None
    rng = random.Random(3)
    prompt = [rng.randrange(2, 160) for _ in range(20)]
    answers = {"first": Answer(), "second": Answer()}
    core.add(EngineRequest("first", prompt, SamplingParams(60, temperature=0.0)))
    run(core, answers)
    core.scheduler._drafting = speculator
    again = prompt + answers["first"].token_ids
    core.add(EngineRequest("second", again, SamplingParams(30, temperature=0.0)))
    run(core, answers)
    assert answers["second"].num_cached_tokens >= 64
    assert core.stats.accepted_tokens == core.stats.draft_tokens > 20


def test_prompt_lookup_answers_in_fewer_steps_what_generate_answers(tiny_models: TinyModels) -> None:
    """The trained demo model without an end token: it repeats itself soon."""
    path = demo_model_path()
    core = make_core(path)
    core._speculator = core.scheduler._drafting = eager(NgramProposer())
    rng = random.Random(7)
    for _ in range(3):
        prompt = random_prompt(rng, 1000)
        answers = {"r": Answer()}
        core.add(EngineRequest("r", prompt, SamplingParams(80, temperature=0.0)))
        run(core, answers)
        assert answers["r"].token_ids == tiny_models.reference(path, prompt, 80, [])
    stats = core.stats
    assert stats.steps < 0.7 * stats.generated_tokens
    assert stats.steps + stats.accepted_tokens == stats.generated_tokens


def test_it_is_on_by_default_and_refuses_what_it_cannot_do(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    core = make_core(path)
    answers = {"r": Answer()}
    core.add(EngineRequest("r", [5, 6, 7, 8] * 8, SamplingParams(60, temperature=0.0, logit_bias={5: 100.0})))
    run(core, answers)
    assert core.stats.accepted_tokens > 0
    with pytest.raises(StartupError, match="--num-speculative-tokens 0 is out of range: 0 is less than the"):
        make_core(path, num_speculative_tokens=0)
