"""A worker whose model is divided over two ranks: it leaves dispatch when one is lost, and comes back by itself."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.keys import CLUSTER
from tests.worker.conftest import MODEL, until
from tests.worker.test_heartbeat import controller
from tests.worker.test_model_worker_process import start

ENDLESS: dict[str, Any] = {"model": MODEL, "prompt": "one", "max_tokens": 1900, "ignore_eos": True}
SHORT: dict[str, Any] = {"model": MODEL, "prompt": "one two", "max_tokens": 8, "temperature": 0}


def ranks(worker: int) -> list[psutil.Process]:
    """Processes by rank."""
    children = psutil.Process(worker).children()
    return sorted(children, key=lambda child: "fastserve.engine.gang_follower" in child.cmdline())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_lost_rank_fails_its_requests_and_the_worker_returns(rank: int, tmp_path: Path) -> None:
    async with (
        controller() as stub,
        start(
            *("--engine", "native", "--device", "cpu", "--max-total-tokens", "4096", "--tp-size", "2"),
            *("--controller-address", stub.url, "--heartbeat-interval-s", "0.05"),
            TMPDIR=str(tmp_path),
        ) as worker,
        aiohttp.ClientSession(headers=CLUSTER) as http,
    ):

        async def answer() -> str:
            async with http.post(worker.address + "/v1/completions", json=SHORT) as response:
                assert response.status == 200
                text: str = (await response.json())["choices"][0]["text"]
                return text

        await until(lambda: bool(worker.address) and stub.known == {worker.address}, 60)
        before = await answer()
        processes = ranks(worker.process.pid)
        assert len(processes) == 2
        async with http.post(worker.address + "/v1/completions", json=ENDLESS | {"stream": True}) as response:
            await response.content.readline()
            os.kill(processes[rank].pid, signal.SIGSTOP)
            began = time.monotonic()
            *_, error, done, _ = (await response.text()).split("\n\n")
        assert time.monotonic() - began < 5
        assert done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
        await until(lambda: stub.known == set())
        await until(lambda: stub.known == {worker.address}, 60)
        assert [process.is_running() for process in processes] == [other != rank for other in range(2)]
        assert await answer() == before
