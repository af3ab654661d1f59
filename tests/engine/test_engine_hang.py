"""An engine process that lives but says nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import pytest

from fastserve.engine.client import EngineProcess
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.settings import EngineConfig
from fastserve.errors import EngineDeadError

from .conftest import TinyModels

TIMEOUT_S = 2.0


async def answer(engine: EngineProcess, max_tokens: int) -> list[int]:
    ids: list[int] = []
    with engine.generate(EngineRequest("r", [2, 3], SamplingParams(max_tokens, temperature=0.0))) as outputs:
        async for output in outputs:
            ids += output.token_ids
    return ids


@pytest.mark.slow
async def test_a_silent_engine_is_killed_within_the_timeout(tiny_models: TinyModels) -> None:
    config = EngineConfig(model_dir=tiny_models.path("llama"), device="cpu", max_total_tokens=4096)
    engine = EngineProcess(config, timeout_s=TIMEOUT_S)
    await engine.start(lambda _: None)
    try:
        dead = asyncio.create_task(engine.wait_dead())
        await asyncio.sleep(1.2 * TIMEOUT_S)
        assert not dead.done(), "an idle engine is not taken for a hung one"
        time.sleep(1.2 * TIMEOUT_S)  # noqa: ASYNC251  a stall of our own process
        await asyncio.sleep(0.3)
        assert not dead.done(), "which is no silence of the engine"
        assert engine.pid is not None
        stopped = psutil.Process(engine.pid)
        os.kill(stopped.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"hung.*2 s \(--engine-timeout-s"):
            await answer(engine, 200)
        assert time.monotonic() - began <= TIMEOUT_S + 0.5
        assert "hung" in await dead
        assert not stopped.is_running()
    finally:
        await engine.close()
