"""Streams when clients disconnect, queues fill and engines fail."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import aiohttp
import openai
import pytest

from fastserve.engine.contract import RequestOutput
from fastserve.engine.fake import Script, noise
from fastserve.errors import FirstTokenLateError
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import MODEL, Running, RunWorker, until

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
LONG: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 1500}


@pytest.mark.parametrize("body", [LONG, LONG | {"stream": True}, LONG | {"stream": True, "n": 3}])
async def test_a_client_that_leaves_stops_the_engine(run_worker: RunWorker, body: dict[str, Any]) -> None:
    async with run_worker(noise, token_s=0.01, limit_worker_concurrency=1) as running:
        async with aiohttp.ClientSession() as http:
            request = asyncio.create_task(http.post(running.url + "/v1/chat/completions", json=body))
            await until(lambda: running.engine.stats.generated_tokens > 3)
            request.cancel()
        assert await running.idle() < 0.2
        generated = running.engine.stats.generated_tokens
        assert running.engine.stats.aborted == body.get("n", 1)
        await asyncio.sleep(0.05)
        assert running.engine.stats.generated_tokens == generated


async def test_a_client_that_leaves_the_queue_is_forgotten(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.01, limit_worker_concurrency=1) as running:
        async with aiohttp.ClientSession() as http:
            for body in (LONG, LONG | {"stream": True}, LONG):
                asyncio.ensure_future(http.post(running.url + "/v1/chat/completions", json=body))  # noqa: RUF006
            await until(lambda: running.runtime.admission.waiting == 2)
        assert await running.idle() < 0.2
        assert len(running.engine.requests) == 1


async def test_a_full_queue_is_429_with_retry_after(run_worker: RunWorker) -> None:
    settings = {"limit_worker_concurrency": 1, "queue_size": 1}
    async with run_worker(noise, token_s=0.01, **settings) as running, aiohttp.ClientSession() as http:
        held = [
            asyncio.create_task(http.post(running.url + "/v1/chat/completions", json=LONG | {"stream": True}))
            for _ in range(2)
        ]
        await until(lambda: running.runtime.admission.waiting == 1)
        for stream in (True, False):
            with pytest.raises(openai.RateLimitError, match="busy") as caught:
                await running.openai.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert caught.value.code == "overloaded"
        async with http.get(running.url + "/metrics") as response:
            text = await response.text()
            assert "fastserve_worker_requests_running 1.0" in text
            assert "fastserve_worker_requests_waiting 1.0" in text
            assert 'fastserve_worker_requests_total{outcome="overloaded"} 2.0' in text
        for task in held:
            task.cancel()


async def test_keep_alive_comments_while_waiting(run_worker: RunWorker) -> None:
    async with run_worker(limit_worker_concurrency=1, first_token_s=1.3) as running:
        body = {"model": MODEL, "prompt": "one two", "stream": True}

        async def events() -> list[str]:
            async with running.http.post(running.url + "/v1/completions", json=body) as response:
                assert response.status == 200
                return (await response.text()).split("\n\n")

        first, queued = await asyncio.gather(events(), events())
        for stream, min_comments in ((first, 1), (queued, 2)):
            comments = [event for event in stream if event.startswith(":")]
            assert comments == [": keep-alive"] * len(comments)
            assert len(comments) >= min_comments
            data = [event.removeprefix("data: ") for event in stream if event.startswith("data: ")]
            assert data[-1] == "[DONE]"
            assert "".join(json.loads(item)["choices"][0]["text"] for item in data[:-1]) == "one two"


def _give_up(running: Running) -> None:
    """As policies do that give up requests before their first token."""
    request_id, kind = running.engine.requests[-1].request_id, FirstTokenLateError.__name__
    running.engine.refuse(RequestOutput(request_id, [], finish_reason="error", error="Too late.", error_kind=kind))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "prompt"), [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "hello"})]
)
async def test_a_request_given_up_before_any_byte_is_503_with_retry_after(
    run_worker: RunWorker, stream: bool, path: str, prompt: dict[str, Any]
) -> None:
    async with run_worker(first_token_s=60.0) as running:
        body = {"model": MODEL, "stream": stream, **prompt}
        asking = asyncio.create_task(running.http.post(running.url + path, json=body))
        await until(lambda: running.engine.requests)
        _give_up(running)
        async with await asking as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert (await response.json())["error"]["code"] == "first_token_late"
        await running.idle()


async def test_a_request_given_up_after_a_keep_alive_ends_with_an_error_event(run_worker: RunWorker) -> None:
    async with run_worker(first_token_s=60.0) as running:
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        async with running.http.post(running.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 200
            assert (await response.content.readline()).startswith(b": ")
            _give_up(running)
            rest = [line for line in (await response.text()).split("\n") if line.startswith("data: ")]
        assert len(rest) == 2
        assert json.loads(rest[0].removeprefix("data: "))["error"]["code"] == "first_token_late"
        assert rest[1] == "data: [DONE]"
        await running.idle()


async def test_an_error_after_the_first_byte_is_the_last_event(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.01) as running:

        async def read(http: aiohttp.ClientSession) -> list[str]:
            async with http.post(running.url + "/v1/chat/completions", json=LONG | {"stream": True}) as response:
                return (await response.text()).split("\n\n")

        reading = asyncio.create_task(read(running.http))
        await until(lambda: running.engine.stats.generated_tokens > 4)
        running.engine.die("The engine fell over.")
        *_, error, done, _ = await reading
        assert done == "data: [DONE]"
        failure = json.loads(error.removeprefix("data: "))
        assert failure["error"]["message"] == "The engine fell over."
        assert failure["error"]["code"] == "engine_dead"
        await until(lambda: running.worker.keeper.ready)
        stream = await running.openai.chat.completions.create(stream=True, **LONG)
        await anext(stream)
        running.engine.fail(running.engine.requests[-1].request_id, "too hot")
        with pytest.raises(openai.APIError, match="too hot"):
            await _exhaust(stream)
        status, answer = await running.post("/v1/chat/completions", LONG | {"max_tokens": 3})
        assert status == 200
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_every_token_has_its_chunk_even_without_text(
    run_worker: RunWorker, say: Callable[[str], Script], tokenizer: Tokenizer
) -> None:
    text = "世界 😀 12"
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
    async with run_worker(say(text), token_s=0.002, stream_interval=1) as running:
        chat = await running.openai.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        role, *parts, end = [chunk.choices[0] async for chunk in chat]
        assert (role.delta.role, role.delta.content) == ("assistant", "")
        assert end.finish_reason == "stop"
        contents = [part.delta.content for part in parts]
        assert len(contents) == num_tokens
        assert "".join(content or "" for content in contents) == text
        assert contents[0] == "", "the first byte of a character: no text yet, but the answer has begun"
        assert None not in contents
        completion = await running.openai.completions.create(model=MODEL, prompt="x", stream=True)
        texts = [chunk.choices[0].text async for chunk in completion]
        assert texts == [*contents, ""]
        held = await running.openai.completions.create(model=MODEL, prompt="x", stream=True, stop=text + " not", n=2)
        mine = [chunk.choices[0] async for chunk in held if chunk.choices[0].index == 1]
        assert [choice.text for choice in mine] == [""] * num_tokens + [text], "withheld until it is decided"
        with_logprobs = await running.openai.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, logprobs=True, stop=text + " not"
        )
        first = [chunk.choices[0] async for chunk in with_logprobs][1]
        assert (first.delta.content, first.logprobs) == ("", None)


async def test_permits_follow_arrival_and_priorities_reach_the_engine(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.01, limit_worker_concurrency=1) as running:
        first = asyncio.create_task(
            running.post("/v1/completions", {"model": MODEL, "prompt": "first", "max_tokens": 20})
        )
        await until(lambda: running.runtime.admission.running == 1)
        waiting: list[asyncio.Task[Any]] = []
        priorities = [5, None, -5, 0, 5, -100]
        for at, priority in enumerate(priorities):
            extra: dict[str, Any] = {} if priority is None else {"priority": priority}
            create: Any = (running.openai.completions if at % 2 else running.openai.chat.completions).create
            body: dict[str, Any] = {"prompt": "x"} if at % 2 else {"messages": HELLO}
            waiting.append(asyncio.create_task(create(model=MODEL, max_tokens=1, seed=at, extra_body=extra, **body)))
            await until(lambda: running.runtime.admission.waiting == len(waiting))
        assert (await first)[0] == 200
        await asyncio.gather(*waiting)
        ran = [(request.priority, request.params.seed) for request in running.engine.requests[1:]]
        assert ran == [(priority or 0, at) for at, priority in enumerate(priorities)]


async def _exhaust(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_leases_in_flight_are_reported(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.01, limit_worker_concurrency=1) as running:
        async with aiohttp.ClientSession() as http:
            for i in range(3):
                headers = {"x-fastserve-lease": f"lease-{i}"}
                asyncio.ensure_future(  # noqa: RUF006
                    http.post(running.url + "/v1/chat/completions", json=LONG, headers=headers)
                )
            await until(lambda: running.runtime.admission.waiting == 2 and running.runtime.status().kv_usage > 0)
            status = running.runtime.status()
            assert sorted(status.leases) == ["lease-0", "lease-1", "lease-2"]
            assert status.queue_length == 3
            assert status.max_concurrency == 1
        await running.idle()
        assert running.runtime.status().leases == []


async def test_requests_with_random_disconnects(run_worker: RunWorker) -> None:
    randomly = random.Random(3)
    outcomes: list[str] = []

    async def one(running: Running, http: aiohttp.ClientSession, number: int) -> None:
        prompt, stream = f"request number {number}", randomly.random() < 0.7
        patience = randomly.choice([0.01, 0.05, 0.2, 30])
        body = {"model": MODEL, "prompt": prompt, "stream": stream, "n": randomly.choice([1, 1, 3]), "max_tokens": 40}
        try:
            async with asyncio.timeout(patience), http.post(running.url + "/v1/completions", json=body) as response:
                assert response.status == 200
                raw = (await response.read()).decode()
        except TimeoutError:
            outcomes.append("left")
            return
        texts = [""] * 3
        if stream:
            events = [event.removeprefix("data: ") for event in raw.split("\n\n") if event.startswith("data: ")]
            assert events[-1] == "[DONE]"
            for event in events[:-1]:
                choice = json.loads(event)["choices"][0]
                texts[choice["index"]] += choice["text"]
        else:
            for choice in json.loads(raw)["choices"]:
                texts[choice["index"]] = choice["text"]
        assert [text for text in texts if text] == [prompt] * int(str(body["n"]))
        outcomes.append("complete")

    async with run_worker(token_s=0.003, limit_worker_concurrency=32) as running:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            await asyncio.gather(*(one(running, http, i) for i in range(120)))
            assert await running.idle() < 1
        assert outcomes.count("left") > 10
        assert outcomes.count("complete") > 10
        stats = running.engine.stats
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
        assert running.runtime.admission.leases == []
        status, _ = await running.post("/v1/completions", {"model": MODEL, "prompt": "still well"})
        assert status == 200
