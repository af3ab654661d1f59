"""An engine process that hangs: requests fail after the timeout, and the worker recovers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.keys import CLUSTER
from tests.worker.conftest import MODEL, until
from tests.worker.test_heartbeat import controller
from tests.worker.test_model_worker_process import start

TIMEOUT_S = 2.0
ENDLESS: dict[str, Any] = {"model": MODEL, "prompt": "one", "max_tokens": 1900, "ignore_eos": True}


async def test_requests_fail_in_time_and_the_worker_returns(tmp_path: Path) -> None:
    too_long_for_a_socket = tmp_path / ("x" * 180)
    too_long_for_a_socket.mkdir()
    engine = ("--engine", "native", "--device", "cpu", "--max-total-tokens", "4096")
    async with (
        controller() as stub,
        start(
            *engine,
            *("--engine-timeout-s", str(TIMEOUT_S)),
            *("--controller-address", stub.url, "--heartbeat-interval-s", "0.05"),
            TMPDIR=str(too_long_for_a_socket),
        ) as worker,
        aiohttp.ClientSession(headers=CLUSTER) as http,
    ):
        await until(lambda: bool(worker.address) and stub.known == {worker.address}, 60)
        (stopped,) = psutil.Process(worker.process.pid).children()
        async with http.post(worker.address + "/v1/completions", json=ENDLESS | {"stream": True}) as response:
            await response.content.readline()
            os.kill(stopped.pid, signal.SIGSTOP)
            began = time.monotonic()
            whole = asyncio.create_task(http.post(worker.address + "/v1/completions", json=ENDLESS))
            *_, error, done, _ = (await response.text()).split("\n\n")
        assert time.monotonic() - began <= TIMEOUT_S + 1
        assert done == "data: [DONE]"
        failure = json.loads(error.removeprefix("data: "))["error"]
        assert (failure["type"], failure["code"]) == ("service_unavailable_error", "engine_dead")
        assert "hung" in failure["message"]
        assert "--engine-timeout-s" in failure["message"]
        async with await whole as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "engine_dead"
        await until(lambda: stub.known == set())
        await until(lambda: stub.known == {worker.address}, 60)
        assert not stopped.is_running()
        async with http.post(worker.address + "/v1/completions", json=ENDLESS | {"max_tokens": 3}) as response:
            assert response.status == 200
            assert (await response.json())["usage"]["completion_tokens"] == 3


async def test_a_timeout_that_an_idle_engine_could_not_keep_is_refused() -> None:
    async with start("--no-register", "--engine-timeout-s", "1") as worker:
        assert await worker.ended() == 2
    assert "argument --engine-timeout-s: 1 is less than the minimum of 2" in worker.log
