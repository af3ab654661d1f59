"""The controller as a web application."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.routing import BaseRoute

from fastserve import __version__
from fastserve.config import ControllerConfig
from fastserve.control.metrics import ControlMetrics
from fastserve.control.registry import WorkerRegistry
from fastserve.control.routes import fastchat_routes, fastserve_routes
from fastserve.control.worker_client import WorkerClient
from fastserve.serving.errors import install_error_handlers


def create_app(config: ControllerConfig, *, clock: Callable[[], float] = time.monotonic) -> FastAPI:
    """Raises StartupError when the dispatch method does not exist. `clock` gives monotonic seconds."""
    registry = WorkerRegistry(
        dispatch_method=config.dispatch_method,
        heartbeat_expiration_s=config.heartbeat_expiration_s,
        clock=clock,
        rng=random.Random(),
    )
    client = WorkerClient()
    metrics = ControlMetrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    routes: list[BaseRoute] = [*fastserve_routes(registry, metrics), *fastchat_routes(registry, client, metrics)]
    app = FastAPI(title="fastserve controller", version=__version__, lifespan=lifespan, routes=routes)
    install_error_handlers(app)
    return app
