"""Controller, API server with a store of its own, and a worker of each kind on fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from fastserve.engine.contract import PoolingInfo
from tests.access.serving import MODEL, run_controller, run_server, run_worker

API_KEY = "sk-whole-cluster"
POOLING = {
    "embedder": PoolingInfo("embed", 8, is_normalized=True),
    "ranker": PoolingInfo("classify", 1, ("relevant",)),
    "classifier": PoolingInfo("classify", 3, ("bad", "fair", "good")),
}
MODELS = {
    "chat": MODEL,
    "completions": MODEL,
    "embeddings": "embedder",
    "pooling": "embedder",
    "rerank": "ranker",
    "score": "ranker",
    "classify": "classifier",
}
"""The served model of each capability."""


@dataclass(frozen=True)
class WholeCluster:
    url: str
    http: aiohttp.ClientSession
    """It sends the API key."""


@asynccontextmanager
async def run_whole_cluster(folder: Path) -> AsyncIterator[WholeCluster]:
    """`folder`: for what the API server stores."""
    async with (
        run_controller() as controller,
        run_worker(controller),
        run_worker(controller, pooling=POOLING["embedder"], model_names=("embedder",)),
        run_worker(controller, pooling=POOLING["ranker"], model_names=("ranker",)),
        run_worker(controller, pooling=POOLING["classifier"], model_names=("classifier",)),
        run_server(
            controller,
            api_keys=(API_KEY,),
            responses_store=str(folder / "responses.sqlite3"),
            batches_folder=str(folder / "batches"),
        ) as url,
        aiohttp.ClientSession(headers={"authorization": f"Bearer {API_KEY}"}) as http,
    ):
        async with asyncio.timeout(20):
            while True:
                async with http.get(url + "/v1/models") as response:
                    if {card["id"] for card in (await response.json())["data"]} == set(MODELS.values()):
                        break
                await asyncio.sleep(0.02)
        yield WholeCluster(url, http)
