"""The controller as a web application."""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from fastserve import __version__
from fastserve.access.addresses import parse_networks
from fastserve.access.key_files import reloading
from fastserve.access.resolving import NetworkResolver
from fastserve.access.service import guard_cluster_service, load_access
from fastserve.config import ControllerConfig
from fastserve.control.admission import WorkerAdmission
from fastserve.control.clock import RunningClock
from fastserve.control.endpoint import DirectRoutes
from fastserve.control.metrics import ControlMetrics
from fastserve.control.registry import RegistryLimits, WorkerRegistry
from fastserve.control.routes import fastchat_routes, fastserve_routes, message_endpoints
from fastserve.control.worker_client import WorkerClient
from fastserve.serving.errors import install_error_handlers
from fastserve.serving.tls import client_ssl_context


def create_app(
    config: ControllerConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
    environ: Mapping[str, str] = os.environ,
) -> FastAPI:
    """Raises StartupError when the dispatch method does not exist, there is no cluster key, or a file for TLS cannot be
    read. `clock` gives monotonic seconds, `environ` the keys.
    """
    access = load_access(config, environ, host=config.host, cluster_hosts=[config.host])
    running_clock = RunningClock(clock)
    registry = WorkerRegistry(
        dispatch_method=config.dispatch_method,
        heartbeat_expiration_s=config.heartbeat_expiration_s,
        limits=RegistryLimits(
            max_workers=config.max_workers,
            max_model_names=config.max_model_names,
            max_leases=config.max_leases,
            model_memory_s=config.model_memory_s,
        ),
        clock=running_clock,
        rng=random.Random(),
    )
    resolver = NetworkResolver(parse_networks(config.allowed_worker_networks))
    client = WorkerClient(access.cluster_keys, resolver, config.max_worker_status_bytes, client_ssl_context(config))

    async def probe(address: str) -> None:
        await client.probe(address, config.worker_probe_timeout_s)

    admission = WorkerAdmission(
        resolver.check, None if config.no_worker_probe else probe, registry.knows, config.max_worker_probes
    )
    metrics = ControlMetrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with (
            reloading(access.cluster_keys, access.admin_keys),
            client,
            admission,
            running_clock.ticking(),
        ):
            yield

    endpoints = message_endpoints(registry, admission, client, metrics)
    # The router has them too, to answer methods other than POST.
    routes: list[BaseRoute] = [Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()]
    routes += [*fastserve_routes(registry, metrics), *fastchat_routes(registry, admission, client)]
    app = FastAPI(title="fastserve controller", version=__version__, lifespan=lifespan, routes=routes, openapi_url=None)
    install_error_handlers(app)
    # The middleware added first is the innermost, so the access checks run before it.
    app.add_middleware(DirectRoutes, endpoints=endpoints)
    guard_cluster_service(app, access, metrics.registry)
    return app
