"""A controller, a worker on a fake engine, and an API server: one fleet for a test module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.gateway.app import create_app as create_api_server
from fastserve.text.parts import ParserFactory
from fastserve.text.tokenizer import Tokenizer
from tests.apps import serve_app
from tests.worker.conftest import MODEL, Running, RunWorker, model_dir, run_worker, say, tokenizer, until

__all__ = ["MODEL", "model_dir", "run_worker", "say", "tokenizer", "until"]

Item = dict[str, Any]


class Talk:
    """The script of a fake engine: says `text`, and keeps the prompts that it was asked with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = "Hello there."
        self.prompts: list[str] = []

    def __call__(self, request: EngineRequest, info: EngineInfo) -> Sequence[int]:
        self.prompts.append(self._tokenizer.decode(request.prompt_ids))
        return self._tokenizer.encode(self.text, add_special_tokens=False)


@dataclass
class Fleet:
    worker: Running
    talk: Talk
    http: aiohttp.ClientSession
    url: str
    clients: dict[str, openai.AsyncOpenAI] = field(default_factory=dict)

    def client(self, key: str = "none", url: str = "") -> openai.AsyncOpenAI:
        base = url or self.url
        return self.clients.setdefault(
            key + base, openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=20)
        )

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
                data = msgspec_json(second.removeprefix("data: "))
                assert first == f"event: {data['type']}"
                found.append(data)
        return found


def msgspec_json(text: str) -> Any:
    import msgspec

    return msgspec.json.decode(text)


StartFleet = Callable[..., Any]


@pytest.fixture
def start_fleet(run_worker: RunWorker, tokenizer: Tokenizer, tmp_path: Path) -> StartFleet:
    @asynccontextmanager
    async def start(
        *, token_s: float = 0.0, num_servers: int = 1, num_workers: int = 1, **options: Any
    ) -> AsyncIterator[Fleet]:
        talk = Talk(tokenizer)
        async with AsyncExitStack() as stack:
            controller = await stack.enter_async_context(serve_app(create_controller(ControllerConfig(insecure=True))))
            worker = await stack.enter_async_context(
                run_worker(
                    talk,
                    token_s=token_s,
                    model_names=(MODEL,),
                    no_register=False,
                    heartbeat_interval_s=0.05,
                    controller_address=controller,
                )
            )
            options.setdefault("responses_store", str(tmp_path / "responses.sqlite3"))
            settings = ApiServerConfig(host="127.0.0.1", controller_address=controller, insecure=True, **options)
            url = await stack.enter_async_context(serve_app(create_api_server(settings)))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            fleet = Fleet(worker, talk, http, url)
            key = (options.get("api_keys") or ("none",))[0]
            for _ in range(500):
                _, cards = await fleet.call("GET", "/v1/models", key=key)
                if cards["data"]:
                    break
            yield fleet
            for client in fleet.clients.values():
                await client.close()

    return start


@pytest.fixture
def parse_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[ParserFactory], None]:
    """Make the worker parse all chats' answers with a parser of the test."""
    from dataclasses import replace

    from fastserve.worker.jobs import Job, JobMaker

    def use(factory: ParserFactory) -> None:
        made = JobMaker.chat_from_fields

        def chat(self: JobMaker, fields: Any, caller: Any) -> Job:
            job = made(self, fields, caller)
            return replace(job, output=replace(job.output, parser=factory))

        monkeypatch.setattr(JobMaker, "chat_from_fields", chat)

    return use
