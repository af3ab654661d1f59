"""Makes what the routes of batches use, and runs batches while the API server runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastserve.config import ApiServerConfig
from fastserve.gateway.batches.routes import Batches
from fastserve.gateway.batches.runner import BatchRunner
from fastserve.gateway.batches.sending import BatchSender
from fastserve.gateway.batches.spare import SpareCapacity
from fastserve.gateway.batches.store import BatchBounds, BatchStore
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.relay import Relay
from fastserve.gateway.sqlite_file import state_folder
from fastserve.openai.routes import ModelRoute
from fastserve.serving.hops import LoopGuard

ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"})
"""Routes that OpenAI's batches take, of those that there are here."""
NONE = "none"
FOLDER = "batches"


@asynccontextmanager
async def open_batches(
    config: ApiServerConfig,
    environ: Mapping[str, str],
    relay: Relay,
    dispatcher: Dispatcher,
    model_routes: Sequence[ModelRoute],
) -> AsyncIterator[Batches]:
    routes = {
        route.path: route for route in model_routes if route.api in ("openai", "responses") and route.path in ENDPOINTS
    }
    if config.batches_folder == NONE:
        yield Batches(None, None, tuple(routes))
        return
    given = config.batches_folder
    bounds = BatchBounds(
        config.max_batch_files, config.max_batch_file_bytes, config.max_batches, config.max_batch_requests
    )
    store = BatchStore(state_folder(environ) / FOLDER if given is None else Path(given), bounds)
    sender = BatchSender(relay, dispatcher, routes, LoopGuard("API server", config.max_hops).next_hops(()))
    runner = BatchRunner(store, sender.send, sender.model_of, SpareCapacity(sender.load, config.batch_concurrency))
    try:
        async with runner.running():
            yield Batches(store, runner, tuple(routes))
    finally:
        store.close()
