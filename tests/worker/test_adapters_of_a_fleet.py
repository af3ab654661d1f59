"""Adapters of several workers behind a controller and an API server: calls reach all workers, and names are listed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fastserve.access.admin import ENV_ADMIN_KEY
from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.engine.fake import Script
from fastserve.errors import EngineDeadError
from fastserve.gateway.app import create_app as create_api_server
from tests.apps import serve_app
from tests.worker.conftest import MODEL, Running, RunWorker
from tests.worker.test_adapters import make_adapter, say_adapter

__all__ = ["say_adapter"]

API_KEY = "an-api-key-of-a-client"
ADMIN_KEY = "an-admin-key-0123456789"


@dataclass
class Fleet:
    url: str
    workers: list[Running]
    http: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with self.http.request(method, self.url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def names(self, key: str | None = None) -> dict[str, str | None]:
        """The base of each model card."""
        _, answer = await self.call("GET", "/v1/models", key=key)
        return {card["id"]: card["parent"] for card in answer["data"]}

    async def until_names(self, expected: dict[str, str | None], key: str | None = None) -> None:
        deadline = time.monotonic() + 10
        while (found := await self.names(key)) != expected:
            assert time.monotonic() < deadline, found


@asynccontextmanager
async def started(run_worker: RunWorker, roots: list[Path], **access: Any) -> AsyncIterator[Fleet]:
    """A controller, a worker for each folder of adapters, and an API server."""
    api_keys = access.pop("api_keys", None)
    script, names = access.pop("script", None), access.pop("names", [MODEL] * len(roots))
    token_s = access.pop("token_s", 0.0)
    access.setdefault("insecure", True)
    async with AsyncExitStack() as stack:
        controller = await stack.enter_async_context(serve_app(create_controller(ControllerConfig(**access))))
        workers = [
            await stack.enter_async_context(
                run_worker(
                    script,
                    token_s=token_s,
                    model_names=(name,),
                    lora_root=str(root),
                    no_register=False,
                    heartbeat_interval_s=0.05,
                    controller_address=controller,
                    **access,
                )
            )
            for name, root in zip(names, roots, strict=True)
        ]
        server = ApiServerConfig(host="127.0.0.1", controller_address=controller, api_keys=api_keys, **access)
        url = await stack.enter_async_context(serve_app(create_api_server(server)))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield Fleet(url, workers, http)


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Two folders with the adapter `a`."""
    made = [tmp_path / "first", tmp_path / "second"]
    for root in made:
        make_adapter(root / "a")
    return made


async def test_loading_and_unloading_reach_all_workers_of_the_base(run_worker: RunWorker, roots: list[Path]) -> None:
    async with started(run_worker, roots) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL})
        body = {"lora_name": "mine", "lora_path": "a", "base_model_name": MODEL}
        status, answer = await fleet.call("POST", "/v1/load_lora_adapter", body)
        assert status == 200
        assert answer["message"] == "Success: LoRA adapter 'mine' added successfully."
        assert [row["status"] for row in answer["workers"]] == [200, 200]
        assert {row["address"] for row in answer["workers"]} == {worker.url for worker in fleet.workers}
        for worker in fleet.workers:
            assert "mine" in worker.runtime.adapters.served_names()
        await fleet.until_names({MODEL: None, "a": MODEL, "mine": MODEL})
        _, card = await fleet.call("GET", "/v1/models/mine")
        assert (card["root"], card["parent"]) == ("a", MODEL)
        assert (await fleet.call("POST", "/v1/unload_lora_adapter", {"lora_name": "mine"}))[0] == 200
        await fleet.until_names({MODEL: None, "a": MODEL})


async def test_an_adapter_is_loaded_on_all_workers_or_on_none(run_worker: RunWorker, roots: list[Path]) -> None:
    make_adapter(roots[0] / "only")
    async with started(run_worker, roots) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL, "only": MODEL})
        first, second = (worker.url for worker in fleet.workers)
        status, answer = await fleet.call("POST", "/v1/load_lora_adapter", {"lora_name": "m", "lora_path": "only"})
        rows = {row["address"]: row for row in answer["workers"]}
        assert {address: row["status"] for address, row in rows.items()} == {first: 200, second: 403}
        assert rows[first]["undone"]
        assert status == 403
        message = answer["error"]["message"]
        assert message.startswith(f"1 of 2 workers failed; {second}: 'only' is not an adapter")
        assert message.endswith("It is loaded on none.")
        for worker in fleet.workers:
            assert "m" not in worker.runtime.adapters.served_names()
        make_adapter(roots[1] / "only")
        assert (await fleet.call("POST", "/v1/load_lora_adapter", {"lora_name": "m", "lora_path": "only"}))[0] == 200


async def test_a_replaced_adapter_stays_where_it_was_replaced(run_worker: RunWorker, roots: list[Path]) -> None:
    make_adapter(roots[0] / "only")
    async with started(run_worker, roots) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL, "only": MODEL})
        assert (await fleet.call("POST", "/v1/load_lora_adapter", {"lora_name": "m", "lora_path": "a"}))[0] == 200
        body = {"lora_name": "m", "lora_path": "only", "load_inplace": True}
        status, answer = await fleet.call("POST", "/v1/load_lora_adapter", body)
        assert status == 403
        assert answer["error"]["message"].endswith("1 have the new one.")
        sources = [{one.name: one.source for one in worker.runtime.adapters.all()}["m"] for worker in fleet.workers]
        assert sources == ["only", "a"]


async def test_unloading_reaches_all_workers_that_have_the_adapter_and_can_be_repeated(
    run_worker: RunWorker, roots: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(run_worker, roots) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL})
        body = {"lora_name": "m", "lora_path": "a"}
        assert (await fleet.call("POST", "/v1/load_lora_adapter", body))[0] == 200

        async def fail(name: str) -> None:
            raise EngineDeadError("The engine died.")

        with monkeypatch.context() as patch:
            patch.setattr(fleet.workers[1].runtime.adapters, "unload", fail)
            status, answer = await fleet.call("POST", "/v1/unload_lora_adapter", {"lora_name": "m"})
        assert (status, [row["status"] for row in answer["workers"]].count(200)) == (503, 1)
        assert "1 of 2 workers failed" in answer["error"]["message"]
        for expected in (200, 404):
            status, answer = await fleet.call("POST", "/v1/unload_lora_adapter", {"lora_name": "m"})
            assert status == expected, answer


@pytest.mark.parametrize("name", ["three", f"{MODEL}:three", "other:a", "x" * 600])
async def test_an_unknown_name_lists_models_and_adapters(run_worker: RunWorker, roots: list[Path], name: str) -> None:
    async with started(run_worker, roots[:1]) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL})
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
        for method, path, given in (("POST", "/v1/chat/completions", body), ("GET", f"/v1/models/{name}", None)):
            status, answer = await fleet.call(method, path, given)
            assert status == 404
            assert answer["error"]["code"] == "model_not_found"
            assert f"Served: {MODEL}, a;" in answer["error"]["message"]


async def test_each_id_is_listed_once_where_models_have_adapters_of_one_name(
    run_worker: RunWorker, roots: list[Path], say_adapter: Script
) -> None:
    make_adapter(roots[0] / "only")
    make_adapter(roots[1] / "first")  # also the name of a model
    names = ["first", "second"]
    async with started(run_worker, roots, script=say_adapter, names=names) as fleet:
        expected = {"first": None, "second": None, "first:a": "first", "second:a": "second", "only": "first"}
        await fleet.until_names(expected | {"second:first": "second"})
        _, answer = await fleet.call("GET", "/v1/models")
        assert len(answer["data"]) == 6
        for name in answer["data"]:
            status, card = await fleet.call("GET", f"/v1/models/{name['id']}")
            assert (status, card["id"]) == (200, name["id"])
            body = {"model": name["id"], "messages": [{"role": "user", "content": "Hi"}]}
            status, answer = await fleet.call("POST", "/v1/chat/completions", body)
            assert status == 200
            adapter = name["id"].rpartition(":")[2] if name["parent"] else "base"
            assert answer["choices"][0]["message"]["content"] == adapter
        for method, path, given in (
            ("POST", "/v1/completions", {"model": "a", "prompt": "Hi"}),
            ("GET", "/v1/models/a", None),
        ):
            status, answer = await fleet.call(method, path, given)
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
            assert "first:a, second:a" in answer["error"]["message"]


@pytest.mark.parametrize("has_admin_key", [True, False])
async def test_workers_get_the_administrators_key_and_never_an_api_key(
    run_worker: RunWorker, roots: list[Path], monkeypatch: pytest.MonkeyPatch, has_admin_key: bool
) -> None:
    """The workers accept the cluster key and the administrator's, so an API key that reaches them is refused."""
    if has_admin_key:
        monkeypatch.setenv(ENV_ADMIN_KEY, ADMIN_KEY)
    async with started(run_worker, roots, insecure=False, api_keys=(API_KEY,)) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL}, API_KEY)
        body = {"lora_name": "mine", "lora_path": "a"}
        status, answer = await fleet.call("POST", "/v1/load_lora_adapter", body, API_KEY)
        if has_admin_key:
            assert status == 403
            status, answer = await fleet.call("POST", "/v1/load_lora_adapter", body, ADMIN_KEY)
        assert status == 200, answer
        assert [row["status"] for row in answer["workers"]] == [200, 200]
        assert (await fleet.call("POST", "/v1/load_lora_adapter", body))[0] == 401
