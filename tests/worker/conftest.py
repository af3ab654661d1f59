"""A worker on a fake engine, served by a real uvicorn server in the test's own event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from fastserve.config import WorkerConfig
from fastserve.demo import demo_model_path
from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.engine.fake import FakeEngine, FakeOptions, Script
from fastserve.serving.listen import bind
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.text.model_files import configured_eos_ids, read_json
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.adapter_source import find_adapters
from fastserve.worker.app import ModelWorker, WorkerSetup
from fastserve.worker.keeper import RestartPolicy
from fastserve.worker.openai_routes import HANDLERS
from fastserve.worker.runtime import ModelHandler, Runtime
from tests.apps import serve_app

MODEL = "fastserve-demo"


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> float:
    """Wait until `condition` holds; return the seconds it took."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"still not so after {timeout_s} s")
        await asyncio.sleep(0.002)
    return time.monotonic() - started


@dataclass
class Running:
    url: str
    worker: ModelWorker
    engine: FakeEngine
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI
    ended: asyncio.Event
    """Set once the worker calls `end_process`."""

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.worker.app.state.runtime
        return runtime

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        async with self.http.post(self.url + path, json=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            return response.status, answer

    async def idle(self, timeout_s: float = 5.0) -> float:
        """Wait until no request runs or waits."""

        def nothing() -> bool:
            stats, admission = self.engine.stats, self.runtime.admission
            return not (stats.num_running + stats.num_waiting + admission.running + admission.waiting)

        return await until(nothing, timeout_s)


RunWorker = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return Path(demo_model_path())


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture(scope="session")
def say(tokenizer: Tokenizer) -> Callable[[str], Script]:
    """Make a script that answers every request with one text."""

    def of(text: str) -> Script:
        ids = tokenizer.encode(text, add_special_tokens=False)

        def script(request: EngineRequest, info: EngineInfo) -> Sequence[int]:
            return ids

        return script

    return of


@pytest.fixture(scope="session")
def run_worker(model_dir: Path) -> RunWorker:
    @asynccontextmanager
    async def run(
        script: Script | None = None,
        *,
        restart_policy: RestartPolicy | None = None,
        prepare: Callable[[FakeOptions], None] | None = None,
        folder: Path = model_dir,
        token_s: float = 0.0,
        first_token_s: float = 0.0,
        max_model_len: int = 2048,
        handlers: Sequence[ModelHandler] = HANDLERS,
        **settings: Any,
    ) -> AsyncIterator[Running]:
        options = FakeOptions(
            vocab_size=int(read_json(folder / "config.json")["vocab_size"]),
            eos_token_ids=configured_eos_ids(folder),
            token_s=token_s,
            first_token_s=first_token_s,
            max_model_len=max_model_len,
        )
        if script is not None:
            options.script = script
        if prepare is not None:
            prepare(options)
        settings.setdefault("no_register", True)
        settings.setdefault("insecure", True)
        config = WorkerConfig(engine="fake", **settings)
        adapters = find_adapters(config, config.model_names or (MODEL,))
        if options.adapters is not None:
            options.adapters |= {adapter.name: adapter.path for adapter in adapters}
        sockets = bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        engine, ended, listening = FakeEngine(options), asyncio.Event(), asyncio.Event()

        async def wait_listening() -> None:
            await listening.wait()

        setup = WorkerSetup(
            config=config,
            engine=engine,
            model_dir=folder,
            tokenizer_dir=folder,
            model_names=config.model_names or (MODEL,),
            address=url,
            wait_listening=wait_listening,
            end_process=ended.set,
            adapters=adapters,
            restart_policy=restart_policy or RestartPolicy(first_pause_s=0.01),
            handlers=handlers,
        )
        worker = ModelWorker(setup)
        async with serve_app(worker.app, sockets):
            listening.set()
            await until(lambda: worker.failure or ended.is_set() or worker.app.state.runtime is not None)
            assert worker.failure is None, "the worker did not start"
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            try:
                # Bodies that are not JSON have this type, too: others are refused before they are parsed.
                async with aiohttp.ClientSession(headers={"content-type": "application/json"}) as http:
                    yield Running(url, worker, engine, http, client, ended)
            finally:
                await client.close()
                await worker.deregister()

    return run
