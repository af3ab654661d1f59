"""The API server's application: everything is made here and passed on."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from fastserve import __version__
from fastserve.config import ApiServerConfig
from fastserve.gateway.auth import ApiKeyMiddleware, load_keys
from fastserve.gateway.context import RequestContextMiddleware, name_failures
from fastserve.gateway.dispatch import open_dispatcher
from fastserve.gateway.metrics import GatewayMetrics
from fastserve.gateway.relay import Relay
from fastserve.gateway.routes import Gateway, router
from fastserve.gateway.upstream import open_session
from fastserve.observability.metrics import CollectorRegistry
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.errors import install_error_handlers
from fastserve.serving.listen import advertised_address
from fastserve.serving.tls import client_ssl_context, serves_tls

logger = logging.getLogger(__name__)


def create_app(config: ApiServerConfig) -> FastAPI:
    """Raises StartupError when the API keys or a file for TLS cannot be read."""
    keys = load_keys(config)
    ssl_context = client_ssl_context(config)
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with (
            open_session(ssl_context) as session,
            open_dispatcher(session, config.controller_address, metrics.bad_table_rows.inc) as dispatcher,
        ):
            relay = Relay(session, dispatcher, metrics, config.worker_timeout_s, time.monotonic)
            logger.info(
                "OpenAI-compatible API: point clients to base_url %s/v1 (%s); controller %s",
                advertised_address(config.host, config.port, ssl=serves_tls(config)),
                "an API key is needed" if keys else "no API key is needed",
                config.controller_address,
            )
            yield {"gateway": Gateway(dispatcher, relay, metrics, registry, int(time.time()))}

    app = FastAPI(title="fastserve API server", version=__version__, lifespan=lifespan, openapi_url=None)
    install_error_handlers(app)
    name_failures(app)
    app.include_router(router)
    # The last one added is the outermost: CORS answers preflights, which carry no key, before keys are asked for.
    app.add_middleware(ApiKeyMiddleware, keys=keys)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_credentials=config.allow_credentials,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        expose_headers=[REQUEST_ID_HEADER, "retry-after"],
    )
    app.add_middleware(RequestContextMiddleware, metrics=metrics, clock=time.monotonic)
    return app
