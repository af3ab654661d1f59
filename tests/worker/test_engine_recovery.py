from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from fastserve.engine.contract import EngineInfo, LoadProgress
from fastserve.worker.heartbeat import Heartbeat
from fastserve.worker.keeper import EngineKeeper, RestartPolicy
from tests.worker.conftest import MODEL, Running, RunWorker, until

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


async def get(running: Running, path: str) -> int:
    async with running.http.get(running.url + path) as response:
        return response.status


async def test_death_is_503_then_it_recovers(run_worker: RunWorker) -> None:
    async with run_worker(restart_policy=RestartPolicy(first_pause_s=0.6)) as running:
        assert (await get(running, "/health"), await get(running, "/ready")) == (200, 200)
        running.engine.die("The engine ran out of memory.")
        await until(lambda: not running.worker.keeper.ready)
        for stream in (True, False):
            with pytest.raises(openai.InternalServerError, match="ran out of memory") as caught:
                await running.openai.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
            assert (caught.value.status_code, caught.value.code) == (503, "engine_dead")
        assert (await get(running, "/health"), await get(running, "/ready")) == (200, 503)
        await until(lambda: running.worker.keeper.ready)
        assert await get(running, "/ready") == 200
        answer = await running.openai.chat.completions.create(model=MODEL, messages=HELLO)
        assert "hello" in (answer.choices[0].message.content or "")
        assert running.engine.starts == 2
        assert not running.ended.is_set()
        async with running.http.get(running.url + "/metrics") as response:
            assert "fastserve_worker_engine_restarts_total 1.0" in await response.text()


async def test_what_waited_in_the_queue_fails_with_the_engine(run_worker: RunWorker) -> None:
    async with run_worker(first_token_s=5, limit_worker_concurrency=1) as running:
        body = {"model": MODEL, "prompt": "x"}
        both = [asyncio.create_task(running.post("/v1/completions", body)) for _ in range(2)]
        await until(lambda: running.runtime.admission.waiting == 1)
        running.engine.options.start_failures += ["not yet"]
        running.engine.die("gone")
        for status, answer in await asyncio.gather(*both):
            assert (status, answer["error"]["code"]) == (503, "engine_dead")


async def test_a_hopeless_engine_is_given_up(run_worker: RunWorker, caplog: pytest.LogCaptureFixture) -> None:
    policy = RestartPolicy(attempts=3, first_pause_s=0.001)
    async with run_worker(restart_policy=policy) as running:
        running.engine.options.start_failures += ["no memory"] * 5
        running.engine.die("crashed")
        async with asyncio.timeout(5):
            await running.ended.wait()
        assert running.worker.keeper.gave_up
        assert running.engine.starts == 1 + 3
        assert await get(running, "/health") == 503
        assert "no memory" in caplog.text
        assert "giving up" in caplog.text


async def test_old_deaths_are_forgiven(run_worker: RunWorker) -> None:
    policy = RestartPolicy(attempts=2, window_s=0.05, first_pause_s=0.001)
    async with run_worker(restart_policy=policy) as running:
        for _ in range(4):
            starts = running.engine.starts
            running.engine.die("crashed")
            await until(lambda: running.engine.starts > starts and running.worker.keeper.ready)  # noqa: B023
            await asyncio.sleep(0.06)
        assert not running.worker.keeper.gave_up


async def test_whatever_stops_a_restart_is_a_failed_attempt(
    run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with run_worker(restart_policy=RestartPolicy(first_pause_s=0.001)) as running:
        start, causes = running.engine.start, [OSError(12, "Cannot allocate memory"), ValueError("malformed")]

        async def flaky(on_progress: Callable[[LoadProgress], None]) -> EngineInfo:
            if causes:
                raise causes.pop(0)
            return await start(on_progress)

        monkeypatch.setattr(running.engine, "start", flaky)
        running.engine.die("crashed")
        await until(lambda: running.engine.starts == 2 and running.worker.keeper.ready)
        assert (await running.post("/v1/completions", {"model": MODEL, "prompt": "x"}))[0] == 200
        assert not running.ended.is_set()
    assert "Cannot allocate memory" in caplog.text
    assert "malformed" in caplog.text


@pytest.mark.parametrize("broken", ["watch", "heartbeat"])
async def test_a_worker_without_its_tasks_ends(
    run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    if broken == "watch":
        monkeypatch.setattr(EngineKeeper, "watch", fail)
    else:
        monkeypatch.setattr(Heartbeat, "run", fail)
    async with run_worker(no_register=False, controller_address="http://127.0.0.1:9") as running:
        async with asyncio.timeout(5):
            await running.ended.wait()
        assert running.worker.keeper.gave_up, "the exit code is to be 1"
    assert broken in caplog.text
    assert "a bug of ours" in caplog.text
