"""Controller, worker and API server in the test's own event loop, on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastserve.config import ApiServerConfig, ControllerConfig, WorkerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.demo import demo_model_path
from fastserve.engine.contract import PoolingInfo
from fastserve.engine.fake import FakeEngine, FakeOptions
from fastserve.gateway.app import create_app as create_server
from fastserve.serving.listen import bind
from fastserve.worker.app import ModelWorker, WorkerSetup
from tests.apps import serve_app

MODEL = "fastserve-demo"


async def eventually(holds: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def run_app(make: Any) -> AsyncIterator[str]:
    """Serve what `make(address)` returns on a free port of the loopback device; yields the address."""
    sockets = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    async with serve_app(make(address), sockets):
        yield address


@asynccontextmanager
async def run_controller(**settings: Any) -> AsyncIterator[str]:
    async with run_app(lambda _: create_controller(ControllerConfig(**settings))) as address:
        yield address


@asynccontextmanager
async def run_server(controller: str, **settings: Any) -> AsyncIterator[str]:
    async with run_app(lambda _: create_server(ApiServerConfig(controller_address=controller, **settings))) as address:
        yield address


@asynccontextmanager
async def run_worker(
    controller: str | None = None, *, pooling: PoolingInfo | None = None, **settings: Any
) -> AsyncIterator[str]:
    """A worker on the fake engine; without a controller, a lone one. `pooling`: of one that embeds or classifies."""
    if controller is None:
        settings["no_register"] = True
    else:
        settings["controller_address"] = controller
    if pooling is not None:
        settings["task"] = pooling.kind
    config = WorkerConfig(engine="fake", heartbeat_interval_s=0.05, **settings)
    folder = Path(demo_model_path())
    made: list[ModelWorker] = []

    async def listening() -> None:
        await asyncio.sleep(0.05)

    def make(address: str) -> Any:
        setup = WorkerSetup(
            config=config,
            engine=FakeEngine(FakeOptions(vocab_size=4096, pooling=pooling)),
            model_dir=folder,
            tokenizer_dir=folder,
            model_names=config.model_names or (MODEL,),
            address=address,
            wait_listening=listening,
            end_process=lambda: None,
        )
        made.append(ModelWorker(setup))
        return made[0].app

    async with run_app(make) as address:
        await made[0].wait_loaded()
        yield address
        await made[0].deregister()
