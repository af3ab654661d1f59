"""A controller, a worker on a fake engine, and an API server: one fleet for a test module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
import pytest_asyncio

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.engine.fake import FakeOptions
from fastserve.gateway.app import create_app as create_api_server
from fastserve.text.parts import ParserFactory
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.jobs import Job, JobMaker
from tests.apps import serve_app
from tests.worker.conftest import MODEL, Running, RunWorker, model_dir, run_worker, say, tokenizer, until

__all__ = ["MODEL", "model_dir", "run_worker", "say", "tokenizer", "until"]

Item = dict[str, Any]


class Talk:
    """The script of a fake engine: says `text`, and keeps the prompts that it was asked with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.engine = FakeOptions()
        """Of the engine that uses the script."""
        self.reset()

    def reset(self) -> None:
        self.text = "Hello there."
        self.prompts: list[str] = []
        self.engine.token_s = 0.0

    def slowly(self, text: str, token_s: float) -> None:
        self.text = text
        self.engine.token_s = token_s

    def __call__(self, request: EngineRequest, info: EngineInfo) -> Sequence[int]:
        self.prompts.append(self._tokenizer.decode(request.prompt_ids))
        return self._tokenizer.encode(self.text, add_special_tokens=False)


@dataclass
class Fleet:
    worker: Running
    talk: Talk
    http: aiohttp.ClientSession
    url: str
    controller: str
    store: str
    clients: dict[str, openai.AsyncOpenAI] = field(default_factory=dict)

    @asynccontextmanager
    async def server(self, **options: Any) -> AsyncIterator[Fleet]:
        """Another API server of the same fleet."""
        settings = ApiServerConfig(host="127.0.0.1", controller_address=self.controller, insecure=True, **options)
        async with serve_app(create_api_server(settings)) as url:
            other = replace(self, url=url, clients={})
            try:
                key = (settings.api_keys or ("none",))[0]
                for _ in range(500):
                    _, cards = await other.call("GET", "/v1/models", key=key)
                    if cards["data"]:
                        break
                yield other
            finally:
                for client in other.clients.values():
                    await client.close()

    def client(self, key: str = "none") -> openai.AsyncOpenAI:
        if key not in self.clients:
            self.clients[key] = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)
        return self.clients[key]

    async def call(self, method: str, path: str, body: Any = None, key: str = "none") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        async with self.http.request(method, self.url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def create(self, **fields: Any) -> tuple[int, Any]:
        return await self.call("POST", "/v1/responses", {"model": MODEL, "input": "hi", **fields})

    async def events(self, path: str = "/v1/responses", body: Any = None, method: str = "POST") -> list[Item]:
        """All events of a stream, whose `event:` lines must agree with their types."""
        found = []
        async with self.http.request(method, self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            for block in (await response.text()).split("\n\n"):
                if not block or block.startswith(":"):
                    continue
                first, second = block.split("\n")
                data = msgspec.json.decode(second.removeprefix("data: "))
                assert first == f"event: {data['type']}"
                found.append(data)
        return found


@asynccontextmanager
async def run_fleet(run_worker: RunWorker, talk: Talk, store: str) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        controller = await stack.enter_async_context(serve_app(create_controller(ControllerConfig(insecure=True))))
        worker = await stack.enter_async_context(
            run_worker(
                talk,
                prepare=lambda fake: setattr(talk, "engine", fake),
                model_names=(MODEL,),
                no_register=False,
                heartbeat_interval_s=0.05,
                controller_address=controller,
            )
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        fleet = Fleet(worker, talk, http, "", controller, store)
        yield await stack.enter_async_context(fleet.server(responses_store=store))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_fleet(
    run_worker: RunWorker, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    store = tmp_path_factory.mktemp("store") / "responses.sqlite3"
    async with run_fleet(run_worker, Talk(tokenizer), str(store)) as fleet:
        yield fleet


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    """The fleet of the module, as if it were new."""
    shared_fleet.talk.reset()
    return shared_fleet


@pytest.fixture
def parse_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[ParserFactory], None]:
    """Make the worker parse all chats' answers with a parser of the test."""

    def use(factory: ParserFactory) -> None:
        made = JobMaker.chat_from_fields

        def chat(self: JobMaker, fields: Any, caller: Any) -> Job:
            job = made(self, fields, caller)
            return replace(job, output=replace(job.output, parser=factory))

        monkeypatch.setattr(JobMaker, "chat_from_fields", chat)

    return use
