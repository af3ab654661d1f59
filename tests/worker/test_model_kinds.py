"""Models that generate and models that embed: each refuses the other's routes by name, one API server serves both."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.gateway.app import create_app as create_api_server
from fastserve.openai.routes import OLLAMA_EMBED, OLLAMA_EMBEDDINGS, POOLING_ROUTES
from fastserve.worker.app import HANDLERS
from tests.apps import serve_app

from .conftest import MODEL, RunWorker
from .test_pooling_routes import EMBEDDER, pooling_worker

TURNS = [{"role": "user", "content": "hi"}]
CHAT = {"model": MODEL, "messages": TURNS}
GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/api/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": MODEL, "prompt": "hi"}),
    ("/v1/responses", {"model": MODEL, "input": "hi"}),
    ("/v1/responses/input_tokens", {"model": MODEL, "input": "hi"}),
    ("/v1/messages", {**CHAT, "max_tokens": 5}),
    ("/v1/messages/count_tokens", CHAT),
    ("/api/chat", CHAT),
    ("/api/generate", {"model": MODEL, "prompt": "hi"}),
    ("/tokenize", CHAT),
    ("/generate", {"inputs": "hi"}),
    ("/generate_stream", {"inputs": "hi"}),
    ("/", {"prompt": "hi"}),
    ("/worker_generate", {"model": MODEL, "prompt": "hi"}),
    ("/worker_generate_stream", {"model": MODEL, "prompt": "hi"}),
]
POOLING_BODY = {
    "model": MODEL,
    "input": "a",
    "prompt": "a",
    "query": "a",
    "documents": ["b"],
    "text_1": "a",
    "text_2": "b",
}


async def test_a_model_that_embeds_refuses_every_generating_route(run_worker: RunWorker) -> None:
    async with pooling_worker(run_worker, EMBEDDER) as running:
        for path, body in GENERATING:
            async with running.http.post(running.url + path, json=body) as response:
                text = await response.text()
                # FastChat's records have HTTP 200.
                assert response.status == (200 if "worker_" in path else 400), (path, text)
                assert "does not support" in text, path
                assert "embeddings (/v1/embeddings)" in text, path
        assert not running.engine.requests
        status, counted = await running.post("/tokenize", {"model": MODEL, "prompt": "a b"})
        assert (status, counted["count"] > 0) == (200, True)


async def test_a_model_that_generates_refuses_every_pooling_route(run_worker: RunWorker) -> None:
    async with run_worker(handlers=HANDLERS) as running:
        for route in (*POOLING_ROUTES, OLLAMA_EMBED, OLLAMA_EMBEDDINGS):
            status, answer = await running.post(route.path.replace("{model:path}", MODEL), POOLING_BODY)
            assert status == 400, route.path
            assert "does not support" in json.dumps(answer), route.path


async def test_one_api_server_serves_both(run_worker: RunWorker) -> None:
    async with AsyncExitStack() as stack:
        controller = await stack.enter_async_context(serve_app(create_controller(ControllerConfig(insecure=True))))
        common: dict[str, Any] = {"controller_address": controller, "insecure": True}
        registered = {**common, "no_register": False, "heartbeat_interval_s": 0.05}
        writer = await stack.enter_async_context(run_worker(model_names=("writer",), handlers=HANDLERS, **registered))
        await stack.enter_async_context(pooling_worker(run_worker, EMBEDDER, model_names=("embedder",), **registered))
        url = await stack.enter_async_context(serve_app(create_api_server(ApiServerConfig(host="127.0.0.1", **common))))

        async def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
            async with writer.http.post(url + path, json=body) as response:
                return response.status, await response.json()

        async with asyncio.timeout(10):
            while True:
                async with writer.http.get(f"{url}/v1/models") as response:
                    if {card["id"] for card in (await response.json())["data"]} == {"writer", "embedder"}:
                        break
                await asyncio.sleep(0.02)
        for path, body, model in (
            ("/v1/chat/completions", {"messages": TURNS}, "writer"),
            ("/v1/responses", {"input": "hi"}, "writer"),
            ("/v1/messages", {"messages": TURNS, "max_tokens": 5}, "writer"),
            ("/v1/embeddings", {"input": "hi"}, "embedder"),
            ("/api/embed", {"input": "hi"}, "embedder"),
        ):
            for asked in ("writer", "embedder"):
                status, answer = await post(path, {"model": asked, **body})
                assert status == (200 if asked == model else 400), (path, asked, answer)
                assert asked == model or "does not support" in json.dumps(answer)


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}:latest"])
async def test_ollamas_clients_get_vectors(run_worker: RunWorker, name: str) -> None:
    async with pooling_worker(run_worker, EMBEDDER) as running:
        _, expected = await running.post("/v1/embeddings", {"model": MODEL, "input": ["a", "b"]})
        vectors = [item["embedding"] for item in expected["data"]]
        status, answer = await running.post("/api/embed", {"model": name, "input": ["a", "b"], "keep_alive": "5m"})
        assert (status, answer["embeddings"], answer["model"]) == (200, vectors, name)
        assert answer["prompt_eval_count"] == expected["usage"]["prompt_tokens"]
        assert answer["total_duration"] > 0
        _, short = await running.post("/api/embed", {"model": name, "input": "a", "dimensions": 3})
        assert [len(vector) for vector in short["embeddings"]] == [3]
        _, old = await running.post("/api/embeddings", {"model": name, "prompt": "b"})
        assert old == {"embedding": vectors[1]}
        long = "word " * 300
        status, _ = await running.post("/api/embed", {"model": name, "input": long})
        assert status == 200, "truncated by default"
        for path, body, word in (
            ("embed", {"input": long, "truncate": False}, "input"),
            ("embed", {"input": ["a", 5]}, "input"),
            ("embed", {"input": "a", "dimensions": 0}, "dimensions"),
            ("embed", {}, "input"),
            ("embeddings", {"prompt": ""}, "prompt"),
        ):
            status, answer = await running.post(f"/api/{path}", {"model": name, **body})
            assert status == 400, body
            assert word in answer["error"], "a string, as Ollama's errors are"
        assert (await running.post("/api/embed", {"model": "nobody", "input": "a"}))[0] == 404
