"""What every engine must do, as tests. A test module subclasses `EngineContract` and gives `make_engine`.

The prompt ids are small numbers, which every vocabulary has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from fastserve.engine.contract import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    LoadProgress,
    RequestOutput,
    SamplingParams,
)
from fastserve.errors import EngineDeadError

PROMPT = [5, 6, 7, 8, 9, 10, 11]
MakeEngine = Callable[[], Engine]
_numbers = itertools.count()


def request(
    prompt: list[int] | None = None, *, choice: int = 0, emitted: list[int] | None = None, **params: Any
) -> EngineRequest:
    sampling = SamplingParams(**{"max_tokens": 8, "temperature": 0.0} | params)
    return EngineRequest(f"r{next(_numbers)}", prompt or PROMPT, sampling, choice=choice, emitted_ids=emitted or [])


async def run(engine: Engine, engine_request: EngineRequest) -> RequestOutput:
    """The whole answer, merged into one output."""
    whole = RequestOutput(engine_request.request_id, [])
    with engine.generate(engine_request) as outputs:
        async for output in outputs:
            assert output.request_id == engine_request.request_id
            assert whole.finish_reason is None, "nothing may follow the last output"
            whole.token_ids += output.token_ids
            whole.finish_reason = output.finish_reason
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


@pytest.mark.asyncio(loop_scope="class")
class EngineContract:
    """A subclass gives a class-scoped fixture `make_engine`; one engine serves all tests but those of start and end."""

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def started(cls, make_engine: MakeEngine) -> AsyncIterator[tuple[Engine, EngineInfo]]:
        engine = make_engine()
        info = await engine.start(_ignore)
        yield engine, info
        await engine.close()

    @pytest.fixture
    def engine(self, started: tuple[Engine, EngineInfo]) -> Engine:
        return started[0]

    @pytest.fixture
    def info(self, started: tuple[Engine, EngineInfo]) -> EngineInfo:
        return started[1]

    async def test_start_reports_progress_and_sizes(self, make_engine: MakeEngine) -> None:
        engine, seen = make_engine(), list[LoadProgress]()
        info = await engine.start(seen.append)
        try:
            assert seen
            assert all(0 <= progress.done <= progress.total for progress in seen)
            assert info.vocab_size > max(PROMPT)
            assert 0 < info.max_model_len <= info.num_blocks * info.block_size
            await wait_stats(engine, lambda stats: stats.num_blocks == info.num_blocks)
            assert engine.stats.num_running == 0
        finally:
            await engine.close()

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

    async def test_close_fails_what_runs_and_what_comes(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        info = await engine.start(_ignore)

        async def one() -> None:
            await run(engine, request(max_tokens=info.max_model_len - len(PROMPT)))

        running = [asyncio.create_task(one()) for _ in range(3)]
        await asyncio.sleep(0.02)
        watching = asyncio.create_task(engine.wait_dead())
        await asyncio.sleep(0)
        await engine.close()
        await engine.close()
        for error in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(error, EngineDeadError)
        with pytest.raises(EngineDeadError), engine.generate(request()):
            pass
        await asyncio.sleep(0.02)
        assert not watching.done(), "a closed engine has not died"
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
