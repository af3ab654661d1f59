"""The API server's application: creates and connects its parts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from fastserve import __version__
from fastserve.access.addresses import check_service_address
from fastserve.access.api_keys import load_api_keys
from fastserve.access.hosts import LOOPBACK_ORIGINS, host_of
from fastserve.access.key_files import reloading
from fastserve.access.service import guard_client_service, load_access
from fastserve.config import ApiServerConfig
from fastserve.errors import StartupError
from fastserve.gateway import adapter_routes, ollama_routes
from fastserve.gateway.api_docs import install_api_docs
from fastserve.gateway.attempt import AnswerBounds, AttemptRunner, ClientRequest
from fastserve.gateway.batches import routes as batch_routes
from fastserve.gateway.batches.open import open_batches
from fastserve.gateway.dispatch import Dispatcher, open_dispatcher
from fastserve.gateway.hops import LoopGuardMiddleware
from fastserve.gateway.metrics import GatewayMetrics
from fastserve.gateway.outliers import OutlierDetector
from fastserve.gateway.relay import Relay
from fastserve.gateway.request_tracking import RequestTrackingMiddleware, name_failures
from fastserve.gateway.retry_budget import RetryBudget
from fastserve.gateway.routes import Gateway, relayed_routes, router
from fastserve.gateway.stored import routes as stored_routes
from fastserve.gateway.stored.create import responses_routes
from fastserve.gateway.stored.state import open_stored
from fastserve.gateway.upstream import open_session
from fastserve.observability.metrics import CollectorRegistry
from fastserve.observability.text import printable
from fastserve.openai.routes import RELAYED_ROUTES, RESPONSES_ROUTES, ModelRoute
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.errors import install_error_handlers
from fastserve.serving.listen import advertised_address
from fastserve.serving.tls import client_ssl_context, serves_tls

logger = logging.getLogger(__name__)


def create_app(
    config: ApiServerConfig,
    *,
    environ: Mapping[str, str] = os.environ,
    model_routes: Sequence[ModelRoute] = RELAYED_ROUTES,
) -> FastAPI:
    """Raises StartupError if keys are missing, a file with keys or for TLS cannot be read, or the controller's address
    is the server's own.

    `environ` holds the cluster keys and the admin keys; `model_routes` are the routes that workers answer.
    """
    _check_controller_address(config)
    keys = load_api_keys(config.api_keys, config.api_keys_file)
    access = load_access(config, environ, host=config.host, cluster_hosts=[host_of(config.controller_address)])
    own_origins_only = config.allowed_origins is None and access.checks_pages and not keys.value
    if not keys.value and not access.is_on_loopback:
        logger.warning("Whoever reaches %s:%d can use the models: set API keys.", config.host, config.port)
    ssl_context = client_ssl_context(config)
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with (
            reloading(keys, access.cluster_keys, access.admin_keys),
            open_session(access.cluster_keys, ssl_context) as session,
            open_dispatcher(session, config.controller_address, metrics.bad_table_rows.inc, model_routes) as dispatcher,
        ):
            relay = _make_relay(config, session, dispatcher, metrics)
            logger.info(
                "OpenAI-compatible API: point clients to base_url %s/v1 (%s); controller %s",
                advertised_address(config.host, config.port, ssl=serves_tls(config)),
                "an API key is needed" if keys.value else "no API key is needed",
                config.controller_address,
            )
            gateway = Gateway(dispatcher, relay, metrics, registry, int(time.time()))
            async with (
                open_stored(config, relay, environ) as stored,
                open_batches(config, environ, relay, dispatcher, model_routes) as batches,
            ):
                yield {"gateway": gateway, "stored": stored, "batches": batches}

    app = FastAPI(title="fastserve API server", version=__version__, lifespan=lifespan, openapi_url=None)
    install_error_handlers(app)
    name_failures(app)
    app.include_router(router)
    app.include_router(adapter_routes.router)
    app.include_router(stored_routes.router)
    app.include_router(batch_routes.router)
    app.include_router(ollama_routes.router)
    app.router.routes += relayed_routes(route for route in model_routes if route not in RESPONSES_ROUTES)
    app.router.routes += responses_routes()
    install_api_docs(app, model_routes)
    # The middleware added last is the outermost: CORS answers preflights, which carry no key, before keys are checked.
    guard_client_service(app, access, registry, keys, allowed_origins=config.allowed_origins or (), json_only=False)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=() if own_origins_only else ("*",) if config.allowed_origins is None else config.allowed_origins,
        allow_origin_regex=LOOPBACK_ORIGINS if own_origins_only else None,
        allow_credentials=config.allow_credentials,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        expose_headers=[REQUEST_ID_HEADER, "retry-after"],
    )
    app.add_middleware(LoopGuardMiddleware, max_hops=config.max_hops)
    app.add_middleware(RequestTrackingMiddleware, metrics=metrics, routes=app.routes, clock=time.monotonic)
    return app


def _make_relay(
    config: ApiServerConfig, session: aiohttp.ClientSession, dispatcher: Dispatcher, metrics: GatewayMetrics
) -> Relay:
    clock = time.monotonic

    def note_first_data(request: ClientRequest) -> None:
        metrics.time_to_first_token.observe(clock() - request.started_at)

    bounds = AnswerBounds(
        silence_s=config.worker_timeout_s,
        max_answer_bytes=config.max_answer_bytes,
        max_event_bytes=config.max_event_bytes,
        max_stream_bytes=config.max_stream_bytes,
    )
    return Relay(
        AttemptRunner(session, dispatcher, bounds, note_first_data),
        dispatcher,
        RetryBudget(clock, config.retry_budget_percent, config.min_retries_per_s),
        OutlierDetector(clock),
        metrics,
        config.max_attempts,
        clock,
    )


def _check_controller_address(config: ApiServerConfig) -> None:
    """Raises StartupError if the address is invalid, or is this server's own."""
    check_service_address(config.controller_address, "--controller-address")
    parts = urlsplit(config.controller_address)
    if parts.port == config.port and parts.hostname in (config.host, "localhost", "127.0.0.1", "::1"):
        raise StartupError(
            f"--controller-address {printable(config.controller_address)} is this API server's own address: name the "
            "controller's (port 21001 by default)."
        )
