from __future__ import annotations

import asyncio

import pytest

from fastserve.engine.fake import FakeEngine, FakeOptions, noise
from fastserve.errors import EngineDeadError, InternalError, StartupError
from tests.worker.engine_contract import EngineContract, MakeEngine, request, run


class TestFakeEngine(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_engine(cls) -> MakeEngine:
        return lambda: FakeEngine(FakeOptions(script=noise, token_s=0.001))

    @pytest.fixture(scope="class")
    @classmethod
    def adapter_dir(cls) -> str:
        return "/anywhere"


async def test_echo_ends_with_the_end_token() -> None:
    engine = FakeEngine(FakeOptions(eos_token_ids=(3,)))
    await engine.start(lambda _: None)
    answer = await run(engine, request([1, 2, 3, 4], stop_token_ids=(3,)))
    assert (answer.token_ids, answer.finish_reason) == ([1, 2, 4, 3], "stop")
    await engine.close()


async def test_it_can_be_made_to_fail() -> None:
    engine = FakeEngine(FakeOptions(start_failures=["no memory"], token_s=0.01))
    with pytest.raises(StartupError, match="no memory"):
        await engine.start(lambda _: None)
    await engine.start(lambda _: None)

    refused = request(max_tokens=100)
    running = asyncio.create_task(run(engine, refused))
    await asyncio.sleep(0.02)
    engine.fail(refused.request_id, "too hot")
    with pytest.raises(InternalError, match="too hot"):
        await running

    running = asyncio.create_task(run(engine, request(max_tokens=100)))
    await asyncio.sleep(0.02)
    engine.die("crashed")
    assert await engine.wait_dead() == "crashed"
    with pytest.raises(EngineDeadError, match="crashed"):
        await running

    await engine.start(lambda _: None)
    assert len((await run(engine, request(max_tokens=3))).token_ids) == 3
    await engine.close()
