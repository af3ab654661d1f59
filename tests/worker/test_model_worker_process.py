"""`python -m fastserve.model_worker` as a real process, on the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.keys import CLUSTER
from tests.worker.conftest import MODEL, until
from tests.worker.test_heartbeat import controller

STARTED = re.compile(r"Uvicorn running on (http://localhost:\d+)")


class Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""
        self.address = ""

    async def read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log += line.decode()
            if found := STARTED.search(self.log):
                self.address = found[1]

    async def ended(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def start(*argv: str, **environ: str) -> AsyncIterator[Process]:
    """Run a worker with these flags and additional environment variables."""
    arguments = ["-m", "fastserve.model_worker", "--engine", "fake", "--port", "0", *argv]
    process = Process(
        await asyncio.create_subprocess_exec(
            sys.executable, *arguments, env={**os.environ, **environ}, stderr=asyncio.subprocess.PIPE
        )
    )
    reading = asyncio.create_task(process.read())
    try:
        yield process
    finally:
        if process.process.returncode is None:
            process.process.kill()
        await process.process.wait()
        await reading


async def test_it_serves_registers_and_deregisters_on_sigterm() -> None:
    async with (
        controller() as stub,
        start("--controller-address", stub.url, "--heartbeat-interval-s", "0.05") as worker,
        aiohttp.ClientSession(headers=CLUSTER) as http,
    ):
        await until(lambda: bool(worker.address), 20)
        await until(lambda: stub.known == {worker.address})
        ready = next(line for line in worker.log.splitlines() if "ready:" in line)
        assert all(part in ready for part in (MODEL, worker.address, "context of 2048 tokens", "KV cache of"))
        body = {"model": MODEL, "prompt": "word " * 200, "stream": True, "max_tokens": 150}
        async with http.post(worker.address + "/v1/completions", json=body) as response:
            assert response.status == 200
            await response.content.readline()
            worker.process.send_signal(signal.SIGTERM)
            await until(lambda: stub.known == set())
            rest = (await response.content.read()).decode()
        assert rest.endswith("data: [DONE]\n\n"), "a running stream ends in its own time"
        assert '"finish_reason":"length"' in rest
        assert await worker.ended() in (0, -signal.SIGTERM)
    assert stub.paths()[-1] == "deregister_worker"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--load-8bit", "--load-4bit"), "--load-8bit and --load-4bit exclude each other"),
        (("--enable-exllama",), "ExLlamaV2 (--enable-exllama and its options) is not available"),
        (("--model-path", "./no/such/model"), "./no/such/model: there is no such folder"),
        (("--gpus", "0", "--num-gpus", "2"), "Larger --num-gpus (2) than --gpus 0!"),
    ],
)
async def test_an_invalid_flag_ends_with_its_error(argv: tuple[str, ...], words: str) -> None:
    async with start("--no-register", *argv) as worker:
        assert await worker.ended() == 1
    assert words in worker.log
    assert "Traceback" not in worker.log


async def test_an_unreadable_model_ends_with_its_error(tmp_path: Path, model_dir: Path) -> None:
    folder = tmp_path / "my model"
    shutil.copytree(model_dir, folder)
    (folder / "tokenizer.json").write_text("{")
    async with start("--no-register", "--model-path", str(folder)) as worker:
        assert await worker.ended() == 1
    assert "tokenizer.json cannot be read" in worker.log.splitlines()[-1]
    assert "Traceback" not in worker.log
    assert "Uvicorn running" not in worker.log


async def test_names_and_the_advertised_address(tmp_path: Path, model_dir: Path) -> None:
    folder = tmp_path / "my model"
    shutil.copytree(model_dir, folder)
    async with (
        controller() as stub,
        start(
            *("--controller", stub.url, "--worker-address", "http://example.invalid:1", "--model-path", str(folder))
        ) as worker,
        aiohttp.ClientSession(headers=CLUSTER) as http,
    ):
        await until(lambda: bool(worker.address), 20)
        await until(lambda: stub.known == {"http://example.invalid:1"})
        async with http.get(worker.address + "/v1/models") as response:
            assert [card["id"] for card in json.loads(await response.text())["data"]] == ["my model"]
        worker.process.send_signal(signal.SIGINT)
        assert await worker.ended() == 0


HOPELESS = """
import asyncio, functools
import fastserve.model_worker as entry
from fastserve.engine.fake import FakeEngine, FakeOptions
from fastserve.worker.keeper import RestartPolicy

class Dying(FakeEngine):
    async def start(self, on_progress):
        info = await super().start(on_progress)
        self.options.start_failures = ["no memory left"] * 9
        asyncio.get_running_loop().call_later(0.3, self.die, "crashed")
        return info

entry._make_engine = lambda *_: Dying(FakeOptions())
entry.RestartPolicy = functools.partial(RestartPolicy, attempts=2, first_pause_s=0.01)
entry.main(["--port", "0", "--no-register"])
"""


async def test_when_the_engine_is_given_up_the_process_ends() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOPELESS, stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    async with asyncio.timeout(20):
        _, log = await process.communicate()
    assert process.returncode == 1
    assert b"crashed" in log
    assert log.count(b"no memory left") == 2
    assert b"Traceback" not in log


UNEXPECTED = """
import fastserve.model_worker as entry
from fastserve.engine.fake import FakeEngine, FakeOptions

class Broken(FakeEngine):
    async def start(self, on_progress):
        raise OSError(28, "No space left on device", "/somewhere")

entry._make_engine = lambda *_: Broken(FakeOptions())
entry.main(["--port", "0", "--no-register"])
"""


async def test_any_failure_at_the_start_is_reported_in_the_last_line() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", UNEXPECTED, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(20):
        _, log = await process.communicate()
    assert process.returncode == 1
    last = log.decode().splitlines()[-1]
    assert "could not start" in last
    assert "No space left on device: '/somewhere'" in last
    assert b"Uvicorn running" not in log


@pytest.mark.parametrize("name", ["bell\a", "x" * 513, "turned \u202e name"])
async def test_a_name_that_cannot_be_announced_ends_the_start(name: str) -> None:
    async with start("--no-register", "--model-names", name) as worker:
        assert await worker.ended() == 1
    assert "--model-names" in worker.log.splitlines()[-1]
    assert "Traceback" not in worker.log


async def test_a_signal_while_the_model_loads_ends_at_once() -> None:
    code = HOPELESS.replace("await super().start(on_progress)", "await asyncio.sleep(60)")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    log = b""
    async with asyncio.timeout(20):
        while b"Started server process" not in log and b"startup complete" not in log:
            log += await process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        log += await process.stderr.read()
        assert await process.wait() in (0, -signal.SIGTERM)
    assert b"Traceback" not in log
