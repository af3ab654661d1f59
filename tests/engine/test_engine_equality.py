"""The engine's greedy tokens are those of transformers' own generate, whatever is scheduled beside them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest

from fastserve.demo import demo_model_path
from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.sampling.order import LOGITS_PROCESSORS
from fastserve.engine.sampling.processor import LogitsProcessor
from fastserve.engine.settings import EngineConfig

from .conftest import CONFIGS, TinyModels

EOS = 1
BASE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_num_seqs": 64, "block_size": 16}


def make_core(
    path: str,
    *,
    overlap: bool | None = None,
    processors: Sequence[LogitsProcessor] = LOGITS_PROCESSORS,
    **settings: Any,
) -> EngineCore:
    """`overlap`: whether steps are launched ahead, None: as the device does it."""
    with pytest.MonkeyPatch.context() as patch:
        if overlap is not None:
            patch.setattr(CpuDevice, "runs_ahead", overlap)
        return build_core(EngineConfig(model_dir=path, **{**BASE, **settings}), lambda *_: None, processors)


@dataclasses.dataclass
class Answer:
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    num_cached_tokens: int = 0


def run(core: EngineCore, answers: dict[str, Answer], max_steps: int = 10_000) -> None:
    """Step until nothing is left, collecting outputs and checking the scheduler after each step."""
    for _ in range(max_steps):
        if not core.has_work:
            return
        collect(core, answers)
    raise AssertionError("the engine did not finish")


def collect(core: EngineCore, answers: dict[str, Answer]) -> None:
    for output in core.step():
        answer = answers[output.request_id]
        assert answer.finish_reason is None
        answer.token_ids += output.token_ids
        answer.finish_reason = output.finish_reason
        answer.num_cached_tokens = output.num_cached_tokens
    core.scheduler.check()


def greedy(
    prompt_ids: list[int], max_tokens: int, request_id: str = "r", stop: tuple[int, ...] = (EOS,)
) -> EngineRequest:
    return EngineRequest(request_id, prompt_ids, SamplingParams(max_tokens, temperature=0.0, stop_token_ids=stop))


def random_prompt(rng: random.Random, vocabulary: int, longest: int = 24) -> list[int]:
    return [rng.randrange(2, vocabulary) for _ in range(rng.randint(1, longest))]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_alone_equals_generate(tiny_models: TinyModels, name: str) -> None:
    path = tiny_models.path(name)
    core = make_core(path)
    rng = random.Random(1)
    for length in (1, 3, 17, 60):
        prompt = [rng.randrange(2, 160) for _ in range(length)]
        answers = {"r": Answer()}
        assert core.add(greedy(prompt, 30)) is None
        run(core, answers)
        expected = tiny_models.reference(path, prompt, 30, [EOS])
        assert answers["r"].token_ids == expected
        assert answers["r"].finish_reason == ("stop" if expected[-1] == EOS else "length")


@pytest.mark.parametrize(
    ("name", "block_size"),
    [
        *((name, 16) for name in ("llama", "gpt_oss")),
        *((name, 4) for name in ("mistral", "gemma2", "demo")),
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in ("llama", "gpt_oss", "qwen2", "qwen3")),
        *(pytest.param(name, 16, marks=pytest.mark.slow) for name in ("qwen2", "qwen3", "mistral", "gemma2", "demo")),
    ],
)
def test_random_mixtures_equal_generate(tiny_models: TinyModels, name: str, block_size: int) -> None:
    """32 requests that arrive and are aborted at random, with chunked prefill, prefix hits and preemption forced.

    Blocks of 4 tokens run on torch's operations, blocks of 16 on the kernel where a compiler is.
    """
    path = demo_model_path() if name == "demo" else tiny_models.path(name)
    preemptions = sum(run_mixture(tiny_models, path, block_size, seed) for seed in range(2))
    assert preemptions > 0


def run_mixture(tiny_models: TinyModels, path: str, block_size: int, seed: int, **settings: Any) -> int:
    """Check one random mixture; return how often a sequence was preempted."""
    # A small budget cuts prompts into chunks; a small pool makes sequences push each other out.
    sizes: dict[str, Any] = {"max_num_batched_tokens": 13, "max_total_tokens": 112, "max_model_len": 100}
    core = make_core(path, block_size=block_size, **sizes, **settings)
    eos = list(core.info.eos_token_ids)
    vocabulary = core.info.vocab_size
    rng = random.Random(seed)
    shared = random_prompt(rng, vocabulary) + [rng.randrange(2, vocabulary) for _ in range(16)]
    requests = []
    for index in range(32):
        prompt = (shared[: rng.randint(8, len(shared))] if rng.random() < 0.5 else []) + random_prompt(rng, vocabulary)
        stop = tuple(eos) if rng.random() < 0.5 else ()
        requests.append(greedy(prompt, rng.randint(1, 36), f"r{index}", stop))
    waiting = list(requests)
    answers: dict[str, Answer] = {}
    aborted: set[str] = set()
    while waiting or core.has_work:
        while waiting and rng.random() < 0.8:
            request = waiting.pop()
            answers[request.request_id] = Answer()
            assert core.add(request) is None
        if answers and rng.random() < 0.03:
            victim = rng.choice(sorted(answers))
            if answers[victim].finish_reason is None:
                core.abort(victim)
                aborted.add(victim)
        collect(core, answers)
    assert core.scheduler.cached_tokens > 0
    assert len(aborted) < len(requests)
    for request in requests:
        params = request.params
        answer = answers[request.request_id]
        is_aborted = request.request_id in aborted
        expected = tiny_models.reference(
            path, request.prompt_ids, params.max_tokens, list(params.stop_token_ids),
            guess=None if is_aborted else answer.token_ids,
        )  # fmt: skip
        if is_aborted:
            assert answer.token_ids == expected[: len(answer.token_ids)]
        else:
            assert answer.token_ids == expected
    assert core.stats.num_used_blocks == 0
    assert core.stats.num_running == core.stats.num_waiting == 0
    return core.scheduler.preemptions


def test_prefix_hits_skip_computation_and_change_nothing(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    core = make_core(path)
    rng = random.Random(3)
    prompt = [rng.randrange(2, 160) for _ in range(41)]
    expected = tiny_models.reference(path, prompt, 12, [EOS])
    answers = {"cold": Answer(), "warm": Answer()}
    for request_id in answers:
        core.add(greedy(prompt, 12, request_id))
        run(core, answers)
    assert answers["cold"].num_cached_tokens == 0
    assert answers["warm"].num_cached_tokens == 32
    assert answers["cold"].token_ids == answers["warm"].token_ids == expected

    without = make_core(path, no_prefix_cache=True)
    answers = {"cold": Answer(), "warm": Answer()}
    for request_id in answers:
        without.add(greedy(prompt, 12, request_id))
        run(without, answers)
    assert answers["warm"].num_cached_tokens == 0
    assert answers["warm"].token_ids == expected


def test_takeover_goes_on_where_another_engine_stopped(tiny_models: TinyModels) -> None:
    """Emitted tokens are replayed silently; greedy and seeded sampling both go on with the same tokens."""
    path = tiny_models.path("qwen2")
    core = make_core(path)
    prompt = list(range(2, 30))
    for params in (
        SamplingParams(20, temperature=0.0),
        SamplingParams(20, temperature=1.3, top_p=0.9, seed=11, presence_penalty=0.5, min_tokens=4),
    ):
        answers = {"whole": Answer(), "rest": Answer()}
        core.add(EngineRequest("whole", prompt, params))
        run(core, answers)
        whole = answers["whole"].token_ids
        core.add(EngineRequest("rest", prompt, params, emitted_ids=whole[:7]))
        run(core, answers)
        assert answers["rest"].token_ids == whole[7:]


def test_seeded_sampling_does_not_depend_on_the_batch(tiny_models: TinyModels) -> None:
    """Same seed, same tokens: alone, in a crowd, and after preemption; other seeds and choices differ."""
    path = tiny_models.path("llama")
    params = SamplingParams(24, temperature=1.0, top_k=40, seed=5)
    prompt = list(range(10, 40))
    core = make_core(path)
    answers = {"alone": Answer()}
    core.add(EngineRequest("alone", prompt, params))
    run(core, answers)

    crowded = make_core(path, max_total_tokens=224, max_model_len=100, max_num_batched_tokens=16)
    rng = random.Random(9)
    for index in range(12):
        request_id = f"other{index}"
        answers[request_id] = Answer()
        crowded.add(EngineRequest(request_id, random_prompt(rng, 160), SamplingParams(30, seed=index)))
    answers["crowd"] = Answer()
    answers["choice"] = Answer()
    crowded.add(EngineRequest("crowd", prompt, params, priority=1))
    crowded.add(EngineRequest("choice", prompt, params, choice=1))
    run(crowded, answers)
    assert crowded.scheduler.preemptions > 0
    assert answers["crowd"].token_ids == answers["alone"].token_ids
    assert answers["choice"].token_ids != answers["alone"].token_ids


def test_priority_runs_first(tiny_models: TinyModels) -> None:
    core = make_core(tiny_models.path("llama"), max_num_seqs=1)
    answers = {name: Answer() for name in ("late", "early")}
    params = SamplingParams(3, temperature=0.0)
    core.add(EngineRequest("late", [2, 3], params, priority=5))
    core.add(EngineRequest("early", [4, 5], params, priority=1))
    order = []
    while core.has_work:
        order += [output.request_id for output in core.step() if output.finish_reason]
    assert order == ["early", "late"]
    assert answers


def test_what_cannot_run_is_refused_and_others_go_on(tiny_models: TinyModels) -> None:
    core = make_core(tiny_models.path("llama"), max_model_len=32)
    answers = {"good": Answer()}
    core.add(greedy([5, 6, 7], 8, "good"))
    for request, word in (
        (greedy([], 4, "empty"), "no tokens"),
        (greedy([2] * 30, 10, "long"), "32"),
        (greedy([5], 8, "good"), "running already"),
    ):
        refused = core.add(request)
        assert refused is not None
        assert refused.finish_reason == "error"
        assert word in (refused.error or "")
    run(core, answers)
    assert answers["good"].finish_reason in ("stop", "length")
