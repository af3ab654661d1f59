"""Routes about tokens and models, on the worker and through the API server. One cluster serves the whole file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.gateway.app import create_app as create_api_server
from fastserve.text.tokenizer import Tokenizer
from tests.apps import serve_app
from tests.worker.conftest import MODEL, Running, RunWorker, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "hello 世界 <|im_end|> 7 + 5"
CHAT: list[Any] = [{"role": "user", "content": "hello"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(run_worker: RunWorker) -> AsyncIterator[tuple[Running, tuple[str, str]]]:
    """A worker, and the addresses of itself and of an API server."""
    async with serve_app(create_controller(ControllerConfig(insecure=True))) as controller:
        to_controller: dict[str, Any] = {"controller_address": controller, "insecure": True}
        async with (
            run_worker(no_register=False, heartbeat_interval_s=0.05, **to_controller) as worker,
            serve_app(create_api_server(ApiServerConfig(host="127.0.0.1", **to_controller))) as url,
        ):
            listed = False
            while not listed:
                async with worker.http.get(f"{url}/v1/models/{MODEL}") as response:
                    listed = response.status == 200
            yield worker, (worker.url, url)


async def ask(worker: Running, url: str, body: Any) -> tuple[int, Any]:
    async with worker.http.post(url, json=body) as response:
        return response.status, await response.json()


async def test_a_text_becomes_tokens_and_a_text_again(
    running: tuple[Running, tuple[str, str]], tokenizer: Tokenizer
) -> None:
    worker, urls = running
    ids = tokenizer.encode(TEXT, add_special_tokens=True)
    for url in urls:
        for body in ({"prompt": TEXT, "model": MODEL}, {"prompt": TEXT}, {"content": TEXT, "add_special": True}):
            status, answer = await ask(worker, url + "/tokenize", body)
            assert (status, answer) == (200, {"count": len(ids), "max_model_len": 2048, "tokens": ids})
        _, answer = await ask(worker, url + "/tokenize", {"prompt": TEXT, "return_token_strs": True})
        assert answer["token_strs"][0] == tokenizer.token_bytes(ids[0]).decode()
        _, answer = await ask(worker, url + "/tokenize", {"content": TEXT, "with_pieces": True})
        assert [item["id"] for item in answer["tokens"]] == tokenizer.encode(TEXT, add_special_tokens=False)
        status, answer = await ask(worker, url + "/detokenize", {"tokens": ids})
        assert (status, answer["prompt"], answer["content"]) == (200, tokenizer.decode(ids), tokenizer.decode(ids))
        for empty in ({"prompt": "", "add_special_tokens": False}, {"content": ""}):
            assert (await ask(worker, url + "/tokenize", empty))[1]["count"] == 0
        assert (await ask(worker, url + "/detokenize", {"tokens": []}))[1]["prompt"] == ""


async def test_a_chat_becomes_the_tokens_that_its_answer_would_follow(
    running: tuple[Running, tuple[str, str]],
) -> None:
    worker, urls = running
    for url in urls:
        for fields in ({}, {"add_generation_prompt": False}, {"model": MODEL}):
            _, answer = await ask(worker, url + "/tokenize", {"messages": CHAT, **fields})
            chat = {"model": MODEL, "messages": CHAT, "max_tokens": 1, **fields}
            _, usage = await ask(worker, url + "/v1/chat/completions", chat)
            assert answer["tokens"] == worker.engine.requests[-1].prompt_ids
            assert answer["count"] == usage["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "messages"),
        ("/tokenize", {"messages": "x"}, "messages"),
        ("/tokenize", {"messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/api/v1/token_check", {"prompts": [{"model": MODEL, "prompt": 5}]}, "prompts.0.prompt"),
        (
            "/api/v1/token_check",
            {"prompts": [{"model": MODEL, "prompt": "x", "max_tokens": -1}]},
            "prompts.0.max_tokens",
        ),
        ("/api/v1/token_check", {"prompts": [{"model": MODEL, "prompt": "x"}] * 2049}, "prompts"),
    ],
)
async def test_what_is_wrong_is_named(
    running: tuple[Running, tuple[str, str]], path: str, body: Any, param: str
) -> None:
    worker, urls = running
    for url in urls:
        status, answer = await ask(worker, url + path, body)
        assert (status, answer["error"]["param"]) == (400, param), answer


async def test_unknown_models_and_several_in_one_request(running: tuple[Running, tuple[str, str]]) -> None:
    worker, urls = running
    for url in urls:
        for path, body in (
            ("/tokenize", {"prompt": "x", "model": "nobody"}),
            ("/detokenize", {"tokens": [1], "model": "nobody"}),
            ("/api/v1/token_check", {"prompts": [{"model": "nobody", "prompt": "x"}]}),
            ("/tokenize", {"prompt": "x", "model": ""}),
            ("/api/v1/token_check", {"prompts": [{"model": "", "prompt": "x"}]}),
        ):
            status, answer = await ask(worker, url + path, body)
            assert (status, answer["error"]["param"]) == (404, "model"), answer
    two = {"prompts": [{"model": MODEL, "prompt": "x"}, {"model": "other", "prompt": "x"}]}
    status, answer = await ask(worker, urls[1] + "/api/v1/token_check", two)
    assert (status, answer["error"]["param"]) == (400, "prompts.1.model")


async def test_fastchats_token_check_and_chat(running: tuple[Running, tuple[str, str]], tokenizer: Tokenizer) -> None:
    worker, urls = running
    count = len(tokenizer.encode("one two", add_special_tokens=True))
    asked = [("one two", 3), ("one two", 2048 - count), ("one two", 2049 - count), ("word " * 9000, 0)]
    for url in urls:
        body = {"prompts": [{"model": MODEL, "prompt": text, "max_tokens": tokens} for text, tokens in asked]}
        status, answer = await ask(worker, url + "/api/v1/token_check", body)
        assert status == 200
        assert [item["fits"] for item in answer["prompts"]] == [True, True, False, False]
        assert answer["prompts"][0] == {"fits": True, "tokenCount": count, "contextLength": 2048}
        status, answer = await ask(worker, url + "/api/v1/chat/completions", {"model": MODEL, "messages": CHAT})
        assert (status, answer["object"]) == (200, "chat.completion")


async def test_a_model_says_how_long_its_context_is(running: tuple[Running, tuple[str, str]]) -> None:
    worker, urls = running
    for url in urls:
        async with worker.http.get(f"{url}/v1/models/{MODEL}") as response:
            card = await response.json()
        assert (response.status, card["id"]) == (200, MODEL)
        assert (card["max_model_len"], card["context_length"]) == (2048, 2048)
        async with worker.http.get(f"{url}/v1/models") as response:
            assert [(item["id"], item["max_model_len"]) for item in (await response.json())["data"]] == [(MODEL, 2048)]
        async with worker.http.get(f"{url}/v1/models/nobody") as response:
            assert response.status == 404
    await until(lambda: not worker.runtime.admission.running)
