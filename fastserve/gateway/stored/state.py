"""Objects that the routes of stored responses use; the application's lifespan makes them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from starlette.requests import Request

from fastserve.config import ApiServerConfig
from fastserve.gateway.relay import Relay
from fastserve.gateway.stored.background import BackgroundRuns
from fastserve.gateway.stored.database import Database, StoreBounds, default_path
from fastserve.gateway.stored.entries import Store

NO_STORE = "none"


@dataclass(frozen=True)
class StoredState:
    store: Store
    runs: BackgroundRuns


@asynccontextmanager
async def open_stored(
    config: ApiServerConfig, relay: Relay, environ: Mapping[str, str] = os.environ
) -> AsyncIterator[StoredState | None]:
    """The store; None with `--responses-store none`. Raises StartupError if its file cannot be used."""
    if config.responses_store == NO_STORE:
        yield None
        return
    path = default_path(environ) if config.responses_store is None else Path(config.responses_store)
    database = Database(path, StoreBounds(config.max_stored_entries, config.max_stored_bytes, config.max_stored_age_s))
    try:
        if config.responses_store is not None:
            database.open_now()
        store = Store(database, config.max_body_bytes)
        runs = BackgroundRuns(relay, store, config.max_background_responses)
        try:
            yield StoredState(store, runs)
        finally:
            await runs.close()
    finally:
        database.close()


def stored_state_of(request: Request) -> StoredState | None:
    """None without a store."""
    return cast("StoredState | None", request.state.stored)
