"""The API server sets a request's seed and choices, so that every worker of a cluster gives the same answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from fastserve.engine.fake import noise
from fastserve.protocol import CHOICES_HEADER, MAX_CHOICES_CHARS, SEED_HEADER
from tests.gateway.cluster import StubWorker, die, start_cluster
from tests.worker.conftest import MODEL, Running, RunWorker

CHAT = "/v1/chat/completions"
TEXTS = "/v1/completions"
BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 1,
    "max_tokens": 12,
}
NOBODY = "http://127.0.0.1:9"
"""An unreachable controller: these tests need none."""


@asynccontextmanager
async def in_cluster(run_worker: RunWorker, **settings: Any) -> AsyncIterator[Running]:
    async with run_worker(noise, no_register=False, controller_address=NOBODY, **settings) as worker:
        yield worker


def texts(answer: dict[str, Any]) -> dict[int, str]:
    """The text of each choice by its index, in the order of the answer."""
    return {choice["index"]: choice.get("text") or choice["message"]["content"] for choice in answer["choices"]}


async def streamed(worker: Running, path: str, body: dict[str, Any], **headers: str) -> dict[int, str]:
    async with worker.http.post(worker.url + path, json={**body, "stream": True}, headers=headers) as response:
        assert response.status == 200
        lines = (await response.text()).splitlines()
    found: dict[int, str] = {}
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                found[choice["index"]] = found.get(choice["index"], "") + text
    return found


# ---- the seed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_request_whose_worker_died_gets_the_answer_that_it_would_have_got(
    run_worker: RunWorker, stream: bool
) -> None:
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(start_cluster(insecure=True))
        first, second = [await stack.enter_async_context(in_cluster(run_worker)) for _ in range(2)]
        seeds = []
        for _ in range(3):
            dying = StubWorker(die)
            await dying.start()
            stack.push_async_callback(dying.kill)
            cluster.controller.workers.clear()
            cluster.controller.add(dying.address, MODEL)
            cluster.controller.add(second.url, MODEL)
            async with cluster.post({**BODY, "stream": stream}) as response:
                assert response.status == 200
                content = await response.text()
            [(_, headers, _)] = dying.requests
            seeds.append(headers[SEED_HEADER])
            # The dead worker would have given the same answer as another worker with the same seed.
            if stream:
                expected = await streamed(first, CHAT, BODY, **{SEED_HEADER: seeds[-1]})
                chunks = [json.loads(line[6:]) for line in content.splitlines() if line.startswith("data: {")]
                deltas = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
                assert {0: "".join(deltas)} == expected
            else:
                status, answer = await first.post(CHAT, BODY, **{SEED_HEADER: seeds[-1]})
                assert status == 200
                assert texts(json.loads(content)) == texts(answer)
        assert len(set(seeds)) == 3, "each request has a seed of its own"


async def test_a_seed_of_the_clients_own_is_kept(run_worker: RunWorker) -> None:
    async with in_cluster(run_worker) as worker:
        alone = await worker.post(CHAT, {**BODY, "seed": 5})
        assert await streamed(worker, CHAT, {**BODY, "seed": 5}, **{SEED_HEADER: "99"}) == texts(alone[1])
        _, other = await worker.post(CHAT, BODY, **{SEED_HEADER: "99"})
        assert texts(other) != texts(alone[1])
        _, same = await worker.post(CHAT, BODY, **{SEED_HEADER: "5"})
        assert texts(same) == texts(alone[1])


async def test_the_seed_of_a_worker_precedes_the_api_servers(run_worker: RunWorker) -> None:
    async with in_cluster(run_worker, seed=3) as worker:
        answers = [texts((await worker.post(CHAT, BODY, **{SEED_HEADER: seed}))[1]) for seed in ("1", "2")]
        answers.append(texts((await worker.post(CHAT, {**BODY, "seed": 3}))[1]))
    assert answers[0] == answers[1] == answers[2]


async def test_a_standalone_worker_ignores_the_headers(run_worker: RunWorker) -> None:
    async with run_worker(noise) as worker:
        headers = {SEED_HEADER: "7", CHOICES_HEADER: "1"}
        answers = [(await worker.post(CHAT, {**BODY, "n": 2}, **headers))[1] for _ in range(2)]
        assert [list(texts(answer)) for answer in answers] == [[0, 1], [0, 1]]
        assert texts(answers[0]) != texts(answers[1])
        status, _ = await worker.post(CHAT, BODY, **{SEED_HEADER: "no number"})
        assert status == 200


async def test_clients_of_the_api_server_cannot_set_what_it_decides(run_worker: RunWorker) -> None:
    async with start_cluster(insecure=True) as cluster, in_cluster(run_worker) as worker:
        cluster.controller.add(worker.url, MODEL)
        answers = []
        for _ in range(2):
            async with cluster.post({**BODY, "n": 2}, headers={SEED_HEADER: "7", CHOICES_HEADER: "1"}) as response:
                assert response.status == 200
                answers.append(texts(await response.json()))
    assert [list(answer) for answer in answers] == [[0, 1], [0, 1]]
    assert answers[0] != answers[1]


# ---- choices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**BODY, "n": 5}),
        (TEXTS, {"model": MODEL, "prompt": ["one", "two three"], "n": 2, "temperature": 1, "max_tokens": 9}),
        (TEXTS, {"model": MODEL, "prompt": ["one", "two"], "n": 2, "temperature": 1, "max_tokens": 9, "echo": True}),
    ],
    ids=["chat", "prompts", "echo"],
)
async def test_the_choices_of_a_request_can_be_generated_by_several_workers(
    run_worker: RunWorker, path: str, body: dict[str, Any]
) -> None:
    async with in_cluster(run_worker) as first, in_cluster(run_worker) as second:
        seed = {SEED_HEADER: "41"}
        _, answer = await first.post(path, body, **seed)
        whole = texts(answer)
        of_first_prompt = [whole[index] for index in range(body["n"])]
        assert len(set(of_first_prompt)) == body["n"], "each choice has its own noise"
        split: dict[int, str] = {}
        for worker, part in ((first, "3,0"), (second, "1")):
            status, answer = await worker.post(path, body, **seed, **{CHOICES_HEADER: part})
            assert status == 200
            assert sorted(texts(answer)) == sorted(map(int, part.split(",")))
            assert await streamed(worker, path, body, **seed, **{CHOICES_HEADER: part}) == texts(answer)
            split |= texts(answer)
        assert split == {index: whole[index] for index in (0, 3, 1)}
        assert len(second.engine.requests) == 2, "nothing is generated that is not asked for"


async def test_usage_counts_what_was_computed_here(run_worker: RunWorker) -> None:
    async with in_cluster(run_worker) as worker:
        body = {"model": MODEL, "prompt": ["one", "two three four five six"], "n": 2, "max_tokens": 3}
        _, answer = await worker.post(TEXTS, body, **{CHOICES_HEADER: "0,1"})
        [[prompt], usage] = [{len(r.prompt_ids) for r in worker.engine.requests}, answer["usage"]]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, 6)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        *((SEED_HEADER, value) for value in ("", "-1", "1.5", "0x10", "9" * 19, "9" * 3000, "\u0663", "1 2", "nan")),
        *((CHOICES_HEADER, value) for value in ("", ",", "0,", "0;1", "-1", "0,0", "2", "9999999", "0-1", "a")),
        (CHOICES_HEADER, ",".join(map(str, range(MAX_CHOICES_CHARS // 2)))),
    ],
)
async def test_invalid_headers_are_refused_by_name(run_worker: RunWorker, header: str, value: str) -> None:
    async with in_cluster(run_worker) as worker:
        status, answer = await worker.post(CHAT, {**BODY, "n": 2}, **{header: value})
        assert (status, answer["error"]["param"]) == (400, header)
        assert header in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 400
        assert not worker.engine.requests


async def test_choices_of_best_of_cannot_be_split(run_worker: RunWorker) -> None:
    async with in_cluster(run_worker) as worker:
        status, answer = await worker.post(CHAT, {**BODY, "n": 1, "best_of": 3}, **{CHOICES_HEADER: "0"})
        assert (status, answer["error"]["param"]) == (400, CHOICES_HEADER)
        async with aiohttp.ClientSession() as http, http.get(worker.url + "/health") as response:
            assert response.status == 200
