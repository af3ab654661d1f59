"""A worker announces its model's capabilities. A new one is a line in the list of routes and a handler."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.gateway.app import create_app as create_api_server
from fastserve.openai.routes import MODEL_ROUTES, ModelRoute
from fastserve.worker.openai_routes import HANDLERS
from fastserve.worker.runtime import ModelHandler
from tests.apps import serve_app
from tests.worker.conftest import MODEL, Running, RunWorker, until


class EmbeddingRequest(BaseModel):
    model: str
    input: list[str]


EMBEDDINGS = ModelRoute(
    "/v1/embeddings", "embeddings", EmbeddingRequest, "list", "Give vectors for texts", contents="data"
)


async def embed(request: Request) -> Response:
    texts = EmbeddingRequest.model_validate_json(await request.body()).input
    return JSONResponse({"object": "list", "data": [{"index": i, "embedding": [len(t)]} for i, t in enumerate(texts)]})


@asynccontextmanager
async def started(
    run_worker: RunWorker, handlers: tuple[ModelHandler, ...], **settings: Any
) -> AsyncIterator[tuple[str, Running]]:
    """A controller, a worker with these handlers, and an API server that has EMBEDDINGS too. Yields its address."""
    control = ControllerConfig(insecure=True)
    async with serve_app(create_controller(control)) as controller:
        to_controller: dict[str, Any] = {"controller_address": controller, "insecure": True}
        server = ApiServerConfig(host="127.0.0.1", **to_controller)
        async with (
            run_worker(
                handlers=handlers, no_register=False, heartbeat_interval_s=0.05, **to_controller, **settings
            ) as worker,
            serve_app(create_api_server(server, model_routes=(*MODEL_ROUTES, EMBEDDINGS))) as url,
        ):
            async with asyncio.timeout(10):
                while True:
                    if await is_listed(worker.http, url):
                        break
                    await asyncio.sleep(0.02)
            yield url, worker


async def is_listed(http: aiohttp.ClientSession, url: str) -> bool:
    async with http.get(f"{url}/v1/models/{MODEL}") as response:
        return response.status == 200


async def ask(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with http.post(url, json={"model": MODEL, **body}) as response:
        return response.status, await response.json()


async def test_a_new_capability_is_a_line_in_the_list_and_a_handler(run_worker: RunWorker) -> None:
    handlers = (*HANDLERS, ModelHandler(EMBEDDINGS, embed, lambda _: True))
    async with started(run_worker, handlers) as (url, worker):
        assert worker.runtime.status().capabilities == ["chat", "completions", "embeddings"]
        status, answer = await ask(worker.http, url + "/v1/embeddings", {"input": ["one", "three"]})
        assert (status, [row["embedding"] for row in answer["data"]]) == (200, [[3], [5]])
        status, answer = await ask(worker.http, url + "/v1/completions", {"prompt": "hi", "max_tokens": 2})
        assert (status, bool(answer["choices"])) == (200, True)
        async with worker.http.get(url + "/openapi.json") as response:
            described = (await response.json())["paths"]["/v1/embeddings"]["post"]
        assert described["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("EmbeddingRequest")
        async with worker.http.get(url + "/metrics") as response:
            assert 'route="/v1/embeddings",status="200"' in await response.text()


async def test_a_malformed_answer_is_refused_on_a_new_route_too(run_worker: RunWorker) -> None:
    async def confused(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": []})

    handlers = (*HANDLERS, ModelHandler(EMBEDDINGS, confused, lambda _: True))
    async with started(run_worker, handlers) as (url, worker):
        status, answer = await ask(worker.http, url + "/v1/embeddings", {"input": ["one"]})
        assert (status, answer["error"]["code"]) == (502, "bad_worker_answer")


async def test_a_handler_that_the_model_cannot_serve_is_not_announced(run_worker: RunWorker) -> None:
    handlers = (*HANDLERS, ModelHandler(EMBEDDINGS, embed, lambda runtime: runtime.info.architecture == "bert"))
    async with started(run_worker, handlers) as (url, worker):
        assert worker.runtime.status().capabilities == ["chat", "completions"]
        status, answer = await ask(worker.http, url + "/v1/embeddings", {"input": ["one"]})
        assert (status, answer["error"]["code"]) == (400, "unsupported_capability")
        assert "chat (/v1/chat/completions), completions (/v1/completions)" in answer["error"]["message"]


async def test_a_model_without_a_chat_template_offers_completions_only(
    run_worker: RunWorker, model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    async with started(run_worker, HANDLERS, folder=folder) as (url, worker):
        assert worker.runtime.status().capabilities == ["completions"]
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        for address, param in ((url, "model"), (worker.url, "messages")):
            status, answer = await ask(worker.http, address + "/v1/chat/completions", chat)
            assert (status, answer["error"]["param"]) == (400, param)
            assert "--chat-template" in answer["error"]["message"]
        status, answer = await ask(worker.http, url + "/v1/completions", {"prompt": "hi", "max_tokens": 2})
        assert (status, bool(answer["choices"])) == (200, True)


async def test_no_capability_is_announced_before_the_model_is_loaded(run_worker: RunWorker) -> None:
    async with run_worker() as worker:
        runtime = worker.worker.app.state.runtime
        worker.worker.app.state.runtime = None
        assert worker.worker.status().capabilities is None
        worker.worker.app.state.runtime = runtime
        await until(lambda: worker.worker.status().capabilities == ["chat", "completions"])


def test_every_route_is_listed_once() -> None:
    assert len({route.path for route in MODEL_ROUTES}) == len({route.capability for route in MODEL_ROUTES})
    assert [handler.route for handler in HANDLERS] == list(MODEL_ROUTES)
