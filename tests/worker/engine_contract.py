"""Contract tests for engines. A test module subclasses `EngineContract` and provides `make_engine`.

The prompt ids are small numbers, which every vocabulary has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import msgspec
import pytest
import pytest_asyncio

from fastserve.engine.calls.adapters import ListAdapters, LoadAdapter, UnloadAdapter
from fastserve.engine.calls.pause import Pause, Resume
from fastserve.engine.calls.profile import StartProfile, StopProfile
from fastserve.engine.calls.reset_prefix_cache import ResetPrefixCache
from fastserve.engine.calls.weights import (
    CheckWeights,
    FinishWeightUpdate,
    GetWeight,
    LeaveWeightGroup,
    SetWeightVersion,
    StartWeightUpdate,
    UpdateWeights,
)
from fastserve.engine.contract import (
    Call,
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    LoadProgress,
    RequestOutput,
    SamplingParams,
)
from fastserve.engine.pausing import PauseMode, PauseState
from fastserve.engine.weight_messages import FromDisk, FromGroup, TensorSpec, UpdateMode, UpdateOptions
from fastserve.errors import (
    ConflictError,
    EngineDeadError,
    EngineTimeoutError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedParameterError,
    WeightGroupNotFoundError,
    WeightNotFoundError,
)

PROMPT = [5, 6, 7, 8, 9, 10, 11]
MakeEngine = Callable[[], Engine]
_numbers = itertools.count()


def request(
    prompt: list[int] | None = None, *, choice: int = 0, emitted: list[int] | None = None, **params: Any
) -> EngineRequest:
    sampling = SamplingParams(**{"max_tokens": 8, "temperature": 0.0} | params)
    return EngineRequest(f"r{next(_numbers)}", prompt or PROMPT, sampling, choice=choice, emitted_ids=emitted or [])


def with_adapter(name: str, **params: Any) -> EngineRequest:
    return msgspec.structs.replace(request(**params), adapter=name)


async def run(engine: Engine, engine_request: EngineRequest, whole: RequestOutput | None = None) -> RequestOutput:
    """Collect an answer into one output, into `whole` as it comes if it is given."""
    whole = RequestOutput(engine_request.request_id, []) if whole is None else whole
    with engine.generate(engine_request) as outputs:
        async for output in outputs:
            assert output.request_id == engine_request.request_id
            assert whole.finish_reason is None, "nothing may follow the last output"
            whole.token_ids += output.token_ids
            whole.finish_reason = output.finish_reason
            whole.weight_versions = output.weight_versions or whole.weight_versions
            whole.num_cached_tokens = max(whole.num_cached_tokens, output.num_cached_tokens)
            if output.logprobs is not None:
                whole.logprobs = (whole.logprobs or []) + output.logprobs
    return whole


async def wait_stats(engine: Engine, condition: Callable[[EngineStats], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition(engine.stats):  # noqa: ASYNC110  engines have no event for this
            await asyncio.sleep(0.005)


def _ignore(_: LoadProgress) -> None:
    pass


class CallThatNoEngineKnows(Call[None], frozen=True):
    pass


@contextlib.asynccontextmanager
async def generating(engine: Engine, count: int = 2, **params: Any) -> AsyncIterator[list[asyncio.Task[RequestOutput]]]:
    """Start requests that generate for a while. Resumes the engine at the end."""
    params = {"max_tokens": 200, "temperature": 1.0} | params
    requests = [request([5, i], **params) for i in range(count)]
    answers = [RequestOutput(each.request_id, []) for each in requests]
    tasks = [asyncio.create_task(run(engine, each, whole)) for each, whole in zip(requests, answers, strict=True)]
    try:
        await wait_stats(engine, lambda _: all(len(whole.token_ids) > 2 for whole in answers))
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.call(Resume())
        await wait_stats(engine, lambda stats: stats.num_running + stats.num_waiting == 0)


@contextlib.asynccontextmanager
async def begun(engine: Engine, count: int = 2, **params: Any) -> AsyncIterator[list[asyncio.Task[RequestOutput]]]:
    """Start requests, and pause the engine while none of them has ended. Resumes it at the end.

    On a busy machine, an engine may finish them before a test sees that they have begun: then they are started again.
    """
    for _ in range(20):
        async with generating(engine, count, **params) as tasks:
            if (await engine.call(Pause("keep"))).num_running == count:
                yield tasks
                return
    raise AssertionError("the answers ended before the engine paused")


async def go_on_until(engine: Engine, pause: Pause) -> PauseState:
    """Resume a paused engine, and pause it again at once."""
    _, state = await asyncio.gather(engine.call(Resume()), engine.call(pause))
    return state


async def sent() -> None:
    """Return once the calls of tasks that have just been created are sent."""
    for _ in range(3):
        await asyncio.sleep(0)


async def is_still(engine: Engine) -> bool:
    """Whether the engine is paused and computes nothing for a while."""
    steps = engine.stats.steps
    await asyncio.sleep(0.1)
    return engine.stats.paused and engine.stats.steps == steps


class Started(NamedTuple):
    engine: Engine
    info: EngineInfo
    progress: list[LoadProgress]


@pytest.mark.asyncio(loop_scope="class")
class EngineContract:
    """A subclass provides class-scoped fixtures: `make_engine`, and `adapter_dir`, an adapter's folder. All tests share
    an engine except that of `close`."""

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def started(cls, make_engine: MakeEngine) -> AsyncIterator[Started]:
        engine, progress = make_engine(), list[LoadProgress]()
        info = await engine.start(progress.append)
        yield Started(engine, info, progress)
        await engine.close()

    @pytest.fixture
    def engine(self, started: Started) -> Engine:
        return started.engine

    @pytest.fixture
    def info(self, started: Started) -> EngineInfo:
        return started.info

    async def test_start_reports_progress_and_sizes(self, started: Started) -> None:
        info = started.info
        assert started.progress
        assert all(0 <= progress.done <= progress.total for progress in started.progress)
        assert info.vocab_size > max(PROMPT)
        assert 0 < info.max_model_len <= info.num_blocks * info.block_size
        await wait_stats(started.engine, lambda stats: stats.num_blocks == info.num_blocks)
        assert started.engine.stats.num_running == 0

    async def test_answers_end_at_max_tokens(self, engine: Engine) -> None:
        for max_tokens in (1, 2, 9):
            answer = await run(engine, request(max_tokens=max_tokens))
            assert len(answer.token_ids) == max_tokens
            assert answer.finish_reason == "length"

    async def test_greedy_and_seeded_answers_repeat(self, engine: Engine) -> None:
        cases: list[dict[str, Any]] = [
            {},
            {"temperature": 1.0, "seed": 7},
            {"temperature": 1.0, "seed": 2**63 - 1, "choice": 3},
        ]
        for params in cases:
            first, second = await run(engine, request(**params)), await run(engine, request(**params))
            assert first.token_ids == second.token_ids

    async def test_company_in_the_batch_changes_nothing(self, engine: Engine) -> None:
        prompts = [PROMPT[: 1 + i % len(PROMPT)] for i in range(12)]
        alone = [await run(engine, request(prompt, temperature=1.0, seed=i)) for i, prompt in enumerate(prompts)]
        together = await asyncio.gather(
            *(run(engine, request(prompt, temperature=1.0, seed=i)) for i, prompt in enumerate(prompts))
        )
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]

    async def test_stop_token_ends_the_answer_and_is_its_last(self, engine: Engine) -> None:
        free = (await run(engine, request(max_tokens=8))).token_ids
        stop = free[4]
        answer = await run(engine, request(max_tokens=8, stop_token_ids=(stop,)))
        assert answer.token_ids == free[: free.index(stop) + 1]
        assert answer.finish_reason == "stop"

    async def test_min_tokens_keeps_stop_tokens_away(self, engine: Engine) -> None:
        stop = (await run(engine, request(max_tokens=1))).token_ids[0]
        answer = await run(engine, request(max_tokens=6, min_tokens=4, stop_token_ids=(stop,)))
        assert len(answer.token_ids) >= 4
        assert stop not in answer.token_ids[:4]

    async def test_logprobs_come_with_each_token(self, engine: Engine) -> None:
        answer = await run(engine, request(max_tokens=5, logprobs=3))
        assert answer.logprobs is not None
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
        for entry in answer.logprobs:
            assert entry.logprob <= 0
            assert len(entry.top) == 3
            assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
        bare = await run(engine, request(max_tokens=2, logprobs=0))
        assert bare.logprobs is not None
        assert [entry.top for entry in bare.logprobs] == [[], []]

    async def test_a_half_done_answer_is_taken_over(self, engine: Engine) -> None:
        params: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 11}
        whole = (await run(engine, request(**params))).token_ids
        rest = await run(engine, request(emitted=whole[:3], **params))
        assert rest.token_ids == whole[3:]
        assert rest.finish_reason == "length"

    async def test_leaving_aborts(self, engine: Engine, info: EngineInfo) -> None:
        aborted = engine.stats.aborted
        with engine.generate(request(max_tokens=info.max_model_len - len(PROMPT))) as outputs:
            async for _ in outputs:
                break
        await wait_stats(engine, lambda stats: stats.aborted == aborted + 1)
        assert engine.stats.num_running == engine.stats.num_used_blocks == 0
        generated = engine.stats.generated_tokens
        await asyncio.sleep(0.05)
        assert engine.stats.generated_tokens == generated

    async def test_a_listener_gets_what_iteration_gives(self, engine: Engine) -> None:
        expected = await run(engine, request(max_tokens=6))
        ended = asyncio.get_running_loop().create_future()
        taken: list[RequestOutput] = []
        with engine.generate(request(max_tokens=6)) as stream:

            def on_ready() -> None:
                output = stream.take()
                assert output is not None
                taken.append(output)
                if output.finish_reason is not None:
                    ended.set_result(output.finish_reason)

            stream.listen(on_ready)
            assert await asyncio.wait_for(ended, 10) == expected.finish_reason
            assert stream.take() is None
        assert [token_id for output in taken for token_id in output.token_ids] == expected.token_ids

    async def test_a_listener_that_comes_late_misses_nothing(self, engine: Engine) -> None:
        finished = engine.stats.finished
        expected = await run(engine, request(max_tokens=3))
        with engine.generate(request(max_tokens=3)) as stream:
            await wait_stats(engine, lambda stats: stats.finished == finished + 2)
            calls: list[None] = []
            stream.listen(lambda: calls.append(None))
            assert len(calls) == 1
            merged = stream.take()
        assert merged is not None
        assert (merged.token_ids, merged.finish_reason) == (expected.token_ids, expected.finish_reason)

    async def test_counters_and_gauges(self, engine: Engine) -> None:
        before = engine.stats
        await asyncio.gather(*(run(engine, request(max_tokens=5)) for _ in range(4)))
        await wait_stats(engine, lambda stats: stats.finished == before.finished + 4)
        after = engine.stats
        assert after.generated_tokens == before.generated_tokens + 20
        assert after.prompt_tokens == before.prompt_tokens + 4 * len(PROMPT)
        assert after.num_running == after.num_waiting == after.num_used_blocks == 0

    # ---- calls --------------------------------------------------------------------------------------------------

    async def test_a_pause_that_keeps_stops_all_and_resuming_loses_nothing(self, engine: Engine) -> None:
        params: dict[str, Any] = {"max_tokens": 100, "temperature": 1.0}
        free = [(await run(engine, request([5, i], **params))).token_ids for i in range(3)]
        async with begun(engine, 2, **params) as tasks:
            state = await go_on_until(engine, Pause("keep"))
            assert (state.paused, state.num_running, state.num_waiting) == (True, 2, 0)
            assert engine.stats.paused
            late = asyncio.create_task(run(engine, request([5, 2], **params)))
            assert await is_still(engine)
            assert engine.stats.num_waiting == 1, "what comes meanwhile waits"
            again = await engine.call(Pause("keep"))
            assert (again.paused, again.num_running, again.num_waiting) == (True, 2, 1)
            assert not (await engine.call(Resume())).paused
            assert [answer.token_ids for answer in await asyncio.gather(*tasks, late)] == free

    async def test_a_pause_that_waits_comes_once_all_that_had_begun_is_finished(self, engine: Engine) -> None:
        async with begun(engine) as tasks:
            pausing = asyncio.create_task(go_on_until(engine, Pause("wait")))
            await sent()
            late = asyncio.create_task(run(engine, request(max_tokens=3)))
            state = await pausing
            assert (state.paused, state.num_running) == (True, 0)
            for task in tasks:
                async with asyncio.timeout(1):  # sent before the reply
                    assert len((await task).token_ids) == 200
            assert await is_still(engine)
            assert not late.done()
            await engine.call(Resume())
            assert len((await late).token_ids) == 3

    async def test_a_pause_that_aborts_ends_all_that_had_begun(self, engine: Engine) -> None:
        async with begun(engine) as tasks:
            aborted = engine.stats.aborted
            state = await go_on_until(engine, Pause("abort"))
            assert (state.paused, state.num_running, state.num_aborted) == (True, 0, 2)
            assert engine.stats.aborted == aborted + 2
            assert engine.stats.num_used_blocks == 0
            for task in tasks:
                answer = await task
                assert answer.finish_reason == "abort"
                assert 0 < len(answer.token_ids) < 200

    @pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
    async def test_pausing_and_resuming_again_changes_nothing(self, engine: Engine, mode: PauseMode) -> None:
        assert not (await engine.call(Resume())).paused
        for _ in range(2):
            assert (await engine.call(Pause(mode))).paused
        assert await is_still(engine)
        for _ in range(2):
            assert not (await engine.call(Resume())).paused
        assert not engine.stats.paused
        assert len((await run(engine, request(max_tokens=4))).token_ids) == 4

    async def test_clients_that_leave_while_paused_are_gone(self, engine: Engine) -> None:
        async with begun(engine) as tasks:
            tasks.append(asyncio.create_task(run(engine, request())))
            await wait_stats(engine, lambda stats: stats.num_waiting == 1)
            for task in tasks:
                task.cancel()
            await wait_stats(engine, lambda stats: stats.num_running + stats.num_waiting + stats.num_used_blocks == 0)
            assert engine.stats.paused

    async def test_a_call_that_takes_too_long_is_left_and_done_all_the_same(self, engine: Engine) -> None:
        async with begun(engine) as tasks:
            with pytest.raises(EngineTimeoutError, match=r"Pause within 0\.005 s"):
                await engine.call(Pause("wait"), timeout_s=0.005)
            await asyncio.gather(*tasks)
            await wait_stats(engine, lambda stats: stats.paused)

    async def test_a_pause_that_another_call_overtakes_fails(self, engine: Engine) -> None:
        async with begun(engine):
            pausing = asyncio.create_task(go_on_until(engine, Pause("wait")))
            await sent()
            assert (await engine.call(Pause("keep"))).num_running == 2
            with pytest.raises(ConflictError):
                await pausing

    async def test_many_calls_at_once_each_get_their_own_reply(self, engine: Engine) -> None:
        async with generating(engine, 3, max_tokens=150) as tasks:
            calls = [Pause("keep"), Resume(), Pause("keep"), Resume()] * 5
            states = await asyncio.gather(*(engine.call(call) for call in calls))
            assert [state.paused for state in states] == [True, False] * 10
            for answer in await asyncio.gather(*tasks):
                assert len(answer.token_ids) == 150

    async def test_a_cache_reset_while_requests_run_changes_no_answer(self, engine: Engine) -> None:
        prompt = PROMPT * 9
        before = await run(engine, request(prompt, max_tokens=40))
        for reset_running_requests in (False, True):
            running = asyncio.create_task(run(engine, request(prompt, max_tokens=40)))
            done = await engine.call(ResetPrefixCache(reset_running_requests))
            assert done.num_preempted <= (1 if reset_running_requests else 0)
            assert (await running).token_ids == before.token_ids
            await engine.call(ResetPrefixCache())
            after = await run(engine, request(prompt, max_tokens=40))
            assert (after.token_ids, after.num_cached_tokens) == (before.token_ids, 0)

    async def test_an_error_of_a_call_has_its_type_and_ends_nothing(self, engine: Engine) -> None:
        async with generating(engine, max_tokens=100) as tasks:
            with pytest.raises(
                UnsupportedParameterError,
                match=r"no call CallThatNoEngineKnows; it has CheckWeights, FinishWeightUpdate, GetWeight, ",
            ):
                await engine.call(CallThatNoEngineKnows())
            with pytest.raises(ConflictError, match="no profile was started"):
                await engine.call(StopProfile())
            for answer in await asyncio.gather(*tasks):
                assert len(answer.token_ids) == 100

    @pytest.mark.parametrize("mode", ["drain", "retract", "in_place", "abort"])
    async def test_a_weight_update_treats_running_requests_as_its_mode_says(
        self, engine: Engine, mode: UpdateMode
    ) -> None:
        old, new = engine.stats.weight_version, f"{mode} it"
        async with generating(engine) as tasks:
            await engine.call(StartWeightUpdate(UpdateOptions(mode, new)))
            update = await engine.call(FinishWeightUpdate())
            assert (update.success, update.weight_version) == (True, new)
            answers = await asyncio.gather(*tasks)
            assert update.num_aborted == sum(answer.finish_reason == "abort" for answer in answers)
            for answer in answers:
                if answer.finish_reason == "length":  # it may have ended before the update
                    assert answer.weight_versions in ({(old,)} if mode in ("drain", "abort") else {(old,), (old, new)})
        assert engine.stats.weight_version == new
        assert (await run(engine, request())).weight_versions == (new,)

    async def test_weight_updates_that_cannot_be_fail_by_name_and_change_nothing(self, engine: Engine) -> None:
        await engine.call(SetWeightVersion("these"))
        checksum = (await engine.call(CheckWeights("checksum"))).checksum
        with pytest.raises(WeightGroupNotFoundError, match="nothing"):
            await engine.call(LeaveWeightGroup("nothing"))
        with pytest.raises(WeightGroupNotFoundError, match="nothing"):
            await engine.call(UpdateWeights(FromGroup("nothing", [TensorSpec("a", "float32", (1,))])))
        with pytest.raises(InvalidRequestError, match="bad"):
            await engine.call(UpdateWeights(FromDisk("/nowhere/bad")))
        with pytest.raises(ConflictError, match="start_weight_update"):
            await engine.call(FinishWeightUpdate())
        with pytest.raises(WeightNotFoundError, match="bad"):
            await engine.call(GetWeight("bad", 1))
        assert (await engine.call(CheckWeights("checksum"))).checksum == checksum
        assert engine.stats.weight_version == "these"

    async def test_adapters_come_and_go_while_the_engine_serves(self, engine: Engine, adapter_dir: str) -> None:
        assert (await engine.call(ListAdapters())).adapters == []
        info = await engine.call(LoadAdapter("one", adapter_dir))
        assert (info.name, info.path, info.num_running) == ("one", adapter_dir, 0)
        assert info.rank > 0
        assert "q_proj" in info.targets
        with pytest.raises(ConflictError, match="one already"):
            await engine.call(LoadAdapter("one", adapter_dir))
        with pytest.raises(InvalidRequestError, match="bad"):
            await engine.call(LoadAdapter("two", f"{adapter_dir}/bad"))
        running = asyncio.create_task(run(engine, with_adapter("one", max_tokens=150)))
        await wait_stats(engine, lambda stats: stats.num_running == 1)
        unloading = asyncio.create_task(engine.call(UnloadAdapter("one")))
        await asyncio.sleep(0)  # so that the call is sent before the request
        with pytest.raises(ModelNotFoundError, match="one is being unloaded"):
            await run(engine, with_adapter("one"))
        assert len((await running).token_ids) == 150
        assert (await unloading).num_running == 0
        with pytest.raises(ModelNotFoundError, match="no adapter one; there are: none"):
            await run(engine, with_adapter("one"))
        with pytest.raises(ModelNotFoundError, match="no adapter one"):
            await engine.call(UnloadAdapter("one"))
        assert len((await run(engine, request())).token_ids) == 8, "the base model is as before"

    async def test_steps_are_profiled_on_demand(self, engine: Engine) -> None:
        started = await engine.call(StartProfile(num_steps=3))
        with pytest.raises(ConflictError, match="already"):
            await engine.call(StartProfile(num_steps=3))
        await run(engine, request(max_tokens=20))
        assert await engine.call(StopProfile()) == started

    async def test_close_fails_what_runs_and_what_comes(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        info = await engine.start(_ignore)

        async def one() -> None:
            await run(engine, request(max_tokens=info.max_model_len - len(PROMPT)))

        running = [asyncio.create_task(one()) for _ in range(3)]
        await wait_stats(engine, lambda stats: stats.num_running == 3)
        pausing = asyncio.create_task(engine.call(Pause("wait")))
        await wait_stats(engine, lambda stats: stats.pausing)
        watching = asyncio.create_task(engine.wait_dead())
        await asyncio.sleep(0)
        await engine.close()
        await engine.close()
        for error in await asyncio.gather(*running, pausing, return_exceptions=True):
            assert isinstance(error, EngineDeadError)
        with pytest.raises(EngineDeadError), engine.generate(request()):
            pass
        with pytest.raises(EngineDeadError):
            await engine.call(Resume())
        await asyncio.sleep(0.02)
        assert not watching.done(), "a closed engine has not died"
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
