"""A controller, a worker on the fake engine, and an API server, in the test's event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.engine.fake import Script
from fastserve.gateway.app import create_app as create_api_server
from tests.apps import serve_app
from tests.worker.conftest import Running, RunWorker, model_dir, run_worker, say, tokenizer

__all__ = ["model_dir", "run_worker", "say", "tokenizer"]


@dataclass
class Served:
    url: str
    """Of the API server."""
    worker: Running
    http: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.json(content_type=None)


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture(scope="session")
def serve(run_worker: RunWorker) -> Serve:
    @asynccontextmanager
    async def start(
        script: Script | None = None, *, api_keys: tuple[str, ...] | None = None, **options: Any
    ) -> AsyncIterator[Served]:
        async with AsyncExitStack() as stack:
            controller = await stack.enter_async_context(serve_app(create_controller(ControllerConfig(insecure=True))))
            registered = {"no_register": False, "heartbeat_interval_s": 0.05, "controller_address": controller}
            worker = await stack.enter_async_context(run_worker(script, **registered, **options))
            server = ApiServerConfig(host="127.0.0.1", controller_address=controller, api_keys=api_keys, insecure=True)
            url = await stack.enter_async_context(serve_app(create_api_server(server)))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            yield Served(url, worker, http)

    return start
