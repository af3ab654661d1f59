"""An engine of several ranks as the worker sees it: answers, failures at start, and the loss of a rank."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import psutil
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save

from fastserve.engine.build import build_core
from fastserve.engine.calls.weights import UpdateWeights
from fastserve.engine.client import EngineProcess
from fastserve.engine.contract import EngineInfo, EngineRequest, LoadProgress, RequestOutput, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.ranks.messages import (
    CHANGES_WEIGHTS,
    ClearAdapter,
    DiscardWeights,
    EndRank,
    ExecuteStep,
    LeaveGroup,
    PlaceAdapter,
    RankCommand,
    ReadWeight,
)
from fastserve.engine.ranks.own_devices import own_cpus
from fastserve.engine.settings import EngineConfig
from fastserve.engine.weight_messages import FromBytes
from fastserve.errors import EngineDeadError, StartupError

from .conftest import TinyModels

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOTICE_S = 5.0
"""Time within which the loss of a rank must be noticed."""


def config(path: str, **settings: object) -> EngineConfig:
    values = {"model_dir": path, "device": "cpu", "max_total_tokens": 320, "tp_size": 2, **settings}
    return EngineConfig(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Started:
    engine: EngineProcess
    info: EngineInfo
    progress: list[LoadProgress]

    @property
    def rank_pids(self) -> list[int]:
        """Process ids by rank."""
        assert self.engine.pid is not None
        return [self.engine.pid, *self.engine.rank_pids]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(tiny_models: TinyModels) -> AsyncIterator[Started]:
    engine = EngineProcess(config(tiny_models.path("llama")))
    progress: list[LoadProgress] = []
    info = await engine.start(progress.append)
    yield Started(engine, info, progress)
    await engine.close()


async def answer(engine: EngineProcess, prompt_ids: list[int], max_tokens: int) -> list[int]:
    with engine.generate(EngineRequest(str(prompt_ids), prompt_ids, greedy(max_tokens))) as outputs:
        return [token_id async for output in outputs for token_id in output.token_ids]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, stop_token_ids=(1,))


async def test_ranks_answer_as_transformers_does(started: Started, tiny_models: TinyModels) -> None:
    prompts = [[5, 9, 70, 31], list(range(2, 45)), [7, 7, 7], [150, 3] * 9]
    answers = await asyncio.gather(*(answer(started.engine, prompt, 12) for prompt in prompts))
    for prompt, found in zip(prompts, answers, strict=True):
        assert found == tiny_models.reference(tiny_models.path("llama"), prompt, 12, [1])


async def test_steps_are_computed_by_one_kernel_call_on_each_rank(started: Started) -> None:
    [whole_step] = [layers for layers in started.info.fused_layers if layers.kind == "whole_step"]
    assert whole_step.fused == 1, whole_step.reason


async def test_one_progress_bar_counts_the_bytes_of_all_ranks(started: Started) -> None:
    done = [event.done for event in started.progress]
    assert done == sorted(done)
    assert started.progress[-1].done == started.progress[-1].total > 0


MAX_ROUNDS = 6
"""Drafts are made where they are measured to be faster, which they are not in every round beside other tests."""


def make_requests(number: int = 0) -> list[EngineRequest]:
    """Requests that share prefixes, repeat themselves (so that drafts are accepted), and together need more KV cache
    than there is; half of them are sampled."""
    generator = random.Random(1)
    common = [generator.randrange(2, 160) for _ in range(40)]
    requests = []
    for index in range(14):
        own = [generator.randrange(2, 160) for _ in range(generator.randrange(1, 12))]
        prompt_ids = common[: 16 * generator.randrange(3)] + own * generator.randrange(1, 5)
        params = SamplingParams(generator.randrange(40, 100), temperature=(0.0, 0.7)[index % 2], seed=index, logprobs=2)
        requests.append(EngineRequest(f"history {number}, {index}", prompt_ids, params))
    return requests


async def collect(engine: EngineProcess, request: EngineRequest, abort_after: int | None) -> RequestOutput:
    whole = RequestOutput(request.request_id, [], logprobs=[])
    assert whole.logprobs is not None
    with engine.generate(request) as outputs:
        async for output in outputs:
            whole.token_ids += output.token_ids
            whole.logprobs += output.logprobs or []
            if abort_after is not None and len(whole.token_ids) >= abort_after:
                break
    return whole


async def test_a_random_history_gives_the_answers_of_one_rank(started: Started, tiny_models: TinyModels) -> None:
    engine = started.engine
    alone = build_core(config(tiny_models.path("llama"), tp_size=1), lambda *_: None)
    expected_answers = [run_alone(alone, request) for request in make_requests()]
    for number in range(MAX_ROUNDS):
        await run_history(engine, make_requests(number), expected_answers)
        if engine.stats.accepted_tokens > 0:
            break
    stats = engine.stats
    assert stats.preemptions > 0
    assert stats.cached_tokens > 0
    assert stats.accepted_tokens > 0


async def run_history(
    engine: EngineProcess, requests: list[EngineRequest], expected_answers: list[RequestOutput]
) -> None:
    """Run the requests together, some of which are aborted, and compare what came of them."""
    aborts = [5 if index % 5 == 4 else None for index in range(len(requests))]
    answers = await asyncio.gather(*map(collect, [engine] * len(requests), requests, aborts))
    for expected, found, abort_after in zip(expected_answers, answers, aborts, strict=True):
        count = len(found.token_ids) if abort_after is not None else len(expected.token_ids)
        assert found.token_ids == expected.token_ids[:count]
        for mine, other in zip(found.logprobs or [], expected.logprobs or [], strict=False):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


def run_alone(core: EngineCore, request: EngineRequest) -> RequestOutput:
    whole = RequestOutput(request.request_id, [], logprobs=[])
    assert whole.logprobs is not None
    assert core.add(request) is None
    while core.has_work:
        for output in core.step():
            whole.token_ids += output.token_ids
            whole.logprobs += output.logprobs or []
    return whole


@pytest.mark.slow
async def test_four_processes_give_the_answers_of_one_rank(tiny_models: TinyModels) -> None:
    requests = make_requests()
    engine = EngineProcess(config(tiny_models.path("llama"), tp_size=4))
    await engine.start(lambda event: None)
    try:
        answers = await asyncio.gather(*(collect(engine, request, None) for request in requests))
        assert engine.stats.preemptions > 0
    finally:
        await engine.close()
    alone = build_core(config(tiny_models.path("llama"), tp_size=1), lambda *_: None)
    for request, found in zip(requests, answers, strict=True):
        expected = run_alone(alone, request)
        assert found.token_ids == expected.token_ids
        for mine, other in zip(found.logprobs or [], expected.logprobs or [], strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


async def lose(started: Started, rank: int, harm: Callable[[int], None]) -> None:
    """Harm a rank while an answer is generated, and check that requests fail in time and only this rank ends."""
    engine, pids = started.engine, started.rank_pids
    begin = 0.0

    async def generate() -> None:
        nonlocal begin
        for index in range(1000):
            request = EngineRequest(f"lost {index}", [3, 4], SamplingParams(200, temperature=0.0))
            with engine.generate(request) as outputs:
                async for _ in outputs:
                    if not begin:
                        begin = time.monotonic()
                        harm(pids[rank])

    with pytest.raises(EngineDeadError):
        await generate()
    assert time.monotonic() - begin < NOTICE_S
    await asyncio.wait_for(engine.wait_dead(), NOTICE_S)
    await eventually(lambda: not psutil.pid_exists(pids[rank]))


async def comes_back(started: Started, lost: int, pids: list[int]) -> None:
    """Wait until the engine is ready again, and check that only the lost rank is a new process."""
    await started.engine.start(lambda event: None)
    new = started.rank_pids
    assert [rank for rank, pid in enumerate(pids) if new[rank] != pid] == [lost]


@pytest.mark.parametrize(
    ("harm", "rank"),
    [(kill, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((kill, 1), (stop, 1), (stop, 0)))],
)
async def test_a_lost_rank_is_noticed_and_starts_again_alone(
    started: Started, tiny_models: TinyModels, harm: Callable[[int], None], rank: int
) -> None:
    pids = started.rank_pids
    await lose(started, rank, harm)
    await comes_back(started, rank, pids)
    prompt = [5, 9, 70, 31]
    assert await answer(started.engine, prompt, 6) == tiny_models.reference(tiny_models.path("llama"), prompt, 6, [1])


@pytest.mark.slow
async def test_several_ranks_lost_at_once_come_back(tiny_models: TinyModels) -> None:
    engine = EngineProcess(config(tiny_models.path("llama"), tp_size=4))
    started = Started(engine, await engine.start(lambda event: None), [])
    request = make_requests()[1]
    try:
        before = (await collect(engine, request, None)).token_ids
        for lost in ([1, 3], [0, 2], [1, 2, 3]):
            pids = started.rank_pids
            for rank in lost:
                kill(pids[rank])
            await asyncio.wait_for(engine.wait_dead(), NOTICE_S)
            await engine.start(lambda event: None)
            assert [rank for rank in range(4) if started.rank_pids[rank] != pids[rank]] == lost
            assert (await collect(engine, request, None)).token_ids == before
    finally:
        await engine.close()


@pytest.mark.slow
async def test_all_ranks_load_again_after_weights_were_updated(tiny_models: TinyModels) -> None:
    engine, prompt = EngineProcess(config(tiny_models.path("llama"))), [5, 9, 70, 31]
    started = Started(engine, await engine.start(lambda event: None), [])
    try:
        before = await answer(engine, prompt, 6)
        tensors = load_file(Path(tiny_models.path("llama")) / "model.safetensors")
        updated = await engine.call(UpdateWeights(FromBytes(save({name: -it for name, it in tensors.items()}))))
        assert updated.success
        assert await answer(engine, prompt, 6) != before
        pids = started.rank_pids
        kill(pids[1])
        await asyncio.wait_for(engine.wait_dead(), NOTICE_S)
        await engine.start(lambda event: None)
        assert not set(started.rank_pids) & set(pids)
        assert await answer(engine, prompt, 6) == before
    finally:
        await engine.close()


async def test_each_command_is_known_to_change_weights_or_not() -> None:
    harmless = {ExecuteStep, ReadWeight, PlaceAdapter, ClearAdapter, LeaveGroup, DiscardWeights, EndRank}
    assert {*CHANGES_WEIGHTS, *harmless} == set(get_args(RankCommand))


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_ranks_lost_at_random_moments_come_back_each_time(started: Started, tiny_models: TinyModels) -> None:
    engine, generator = started.engine, random.Random(7)
    requests = make_requests()
    alone = build_core(config(tiny_models.path("llama"), tp_size=1), lambda *_: None)
    expected = [run_alone(alone, request) for request in requests]
    for _ in range(int(os.environ.get("FASTSERVE_RANK_LOSSES", "10"))):
        pids, rank, harm = started.rank_pids, generator.randrange(2), generator.choice([kill, stop])
        running = [asyncio.create_task(collect(engine, request, None)) for request in requests]
        await asyncio.sleep(generator.random() * 0.4)  # requests may all be done: then ranks are lost while idle
        harm(pids[rank])
        await asyncio.wait_for(engine.wait_dead(), NOTICE_S)
        for found, right in zip(await asyncio.gather(*running, return_exceptions=True), expected, strict=True):
            if isinstance(found, RequestOutput):
                assert found.token_ids == right.token_ids
            else:
                assert isinstance(found, EngineDeadError)
        await comes_back(started, rank, pids)
        for request, right in zip(requests, expected, strict=True):
            assert (await collect(engine, request, None)).token_ids == right.token_ids


@pytest.mark.slow
async def test_the_loss_of_an_idle_rank_is_noticed(started: Started) -> None:
    pids = started.rank_pids
    kill(pids[1])
    reason = await asyncio.wait_for(started.engine.wait_dead(), NOTICE_S)
    assert "rank 1" in reason
    await comes_back(started, 1, pids)


async def test_a_stopped_rank_is_noticed(started: Started) -> None:
    await lose(started, 0, stop)  # the last test of this engine, which saves its start


@pytest.mark.slow
async def test_a_rank_that_cannot_start_says_why(tiny_models: TinyModels) -> None:
    engine = EngineProcess(config(tiny_models.path("llama"), max_model_len=5000))
    with pytest.raises(StartupError, match="--max-model-len 5000 exceeds the model's context"):
        await engine.start(lambda event: None)
    await engine.close()


async def eventually(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_ranks_share_the_cpus() -> None:
    assert [list(own_cpus([4, 5, 6, 7, 8], rank, 2)) for rank in range(2)] == [[4, 5], [6, 7, 8]]
    assert own_cpus([0, 1], 3, 4) == []
