"""Bodies meant to exhaust the worker while others use it. A real process, so that its memory can be measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio

from tests.keys import CLUSTER
from tests.worker.conftest import MODEL, until
from tests.worker.test_heartbeat import StubController, controller
from tests.worker.test_model_worker_process import start

pytestmark = pytest.mark.asyncio(loop_scope="module")

ATTACK_S = 0.8
GOOD_CLIENTS = 8
ATTACKERS = 4
MAX_GROWTH_BYTES = 300_000_000
GOOD: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
MEBIBYTE = 2**20


def chat_of(messages: str) -> bytes:
    return f'{{"model": "{MODEL}", "messages": {messages}}}'.encode()


def completion_of(prompt: str) -> bytes:
    return f'{{"model": "{MODEL}", "max_tokens": 1, "prompt": {prompt}}}'.encode()


ATTACKS: dict[str, Callable[[], bytes]] = {
    "wrong elements": lambda: chat_of("[" + "0," * 2 * MEBIBYTE + "0]"),
    "empty objects": lambda: chat_of("[" + "{}," * MEBIBYTE + "{}]"),
    "tiny messages": lambda: chat_of("[" + ",".join(['{"role": "user", "content": "a"}'] * 150_000) + "]"),
    "empty parts": lambda: chat_of('[{"role": "user", "content": [' + "{}," * MEBIBYTE + "{}]}]"),
    "one long text": lambda: chat_of(json.dumps([{"role": "user", "content": "word " * (6 * MEBIBYTE // 5)}])),
    "a long word": lambda: completion_of(json.dumps("a" * 6 * MEBIBYTE)),
    "long texts": lambda: completion_of(json.dumps(["b " * 500_000] * 6)),
    "token ids": lambda: completion_of("[" + "5," * 2 * MEBIBYTE + "5]"),
    "lists of token ids": lambda: completion_of("[" + "[5]," * MEBIBYTE + "[5]]"),
    "stop strings": lambda: completion_of('"x", "stop": [' + '"y",' * MEBIBYTE + '"y"]'),
    "biases": lambda: completion_of('"x", "logit_bias": {' + ",".join(f'"{i}": 1' for i in range(400_000)) + "}"),
    "an unknown field": lambda: completion_of('"x", "whatever": [' + "[]," * MEBIBYTE + "[]]"),
    "brackets in a text": lambda: chat_of(json.dumps([{"role": "user", "content": "[{" * MEBIBYTE}])),
    "nesting": lambda: chat_of("[" * MEBIBYTE),
    "escapes": lambda: completion_of('"' + "\\u00e9" * MEBIBYTE + '"'),
}


QUICK = ("wrong elements", "tiny messages", "a long word", "token ids", "biases", "nesting")


@dataclass
class Target:
    address: str
    pid: int
    http: aiohttp.ClientSession
    controller: StubController


@dataclass
class Seen:
    answers: int = 0
    wrong: list[Any] = field(default_factory=list)
    peak_bytes: int = 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target() -> AsyncIterator[Target]:
    async with (
        controller() as stub,
        start("--controller-address", stub.url, "--heartbeat-interval-s", "0.2") as worker,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=CLUSTER) as http,
    ):
        await until(lambda: bool(worker.address), 30)
        yield Target(worker.address, worker.process.pid, http, stub)


async def be_good(target: Target, seen: Seen, stop: asyncio.Event) -> None:
    while not stop.is_set():
        async with target.http.post(target.address + "/v1/chat/completions", json=GOOD) as response:
            answer = await response.json()
        seen.answers += 1
        if response.status != 200:
            seen.wrong.append(answer)


async def attack(target: Target, body: bytes, statuses: set[int], stop: asyncio.Event) -> None:
    headers = {"Content-Type": "application/json"}
    while not stop.is_set():
        async with target.http.post(target.address + "/v1/completions", data=body, headers=headers) as response:
            await response.read()
            statuses.add(response.status)
        async with target.http.post(target.address + "/v1/chat/completions", data=body, headers=headers) as response:
            await response.read()
            statuses.add(response.status)
        async with target.http.post(target.address + "/worker_generate", data=body, headers=headers) as response:
            await response.read()
            assert response.status in (200, 413)


async def watch_memory(target: Target, seen: Seen, stop: asyncio.Event) -> None:
    process = psutil.Process(target.pid)
    while not stop.is_set():
        seen.peak_bytes = max(seen.peak_bytes, process.memory_info().rss)
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in ATTACKS]
)
async def test_a_flood_costs_its_senders_an_error_and_others_nothing(target: Target, kind: str) -> None:
    body, statuses, seen, stop = ATTACKS[kind](), set[int](), Seen(), asyncio.Event()
    before = psutil.Process(target.pid).memory_info().rss
    beats = len(target.controller.calls)
    async with asyncio.TaskGroup() as group:
        for _ in range(GOOD_CLIENTS):
            group.create_task(be_good(target, seen, stop))
        for _ in range(ATTACKERS):
            group.create_task(attack(target, body, statuses, stop))
        group.create_task(watch_memory(target, seen, stop))
        await asyncio.sleep(ATTACK_S)
        stop.set()
    assert statuses <= {400, 413, 429, 503}, "an error for each, and of the right kind"
    assert seen.answers >= GOOD_CLIENTS
    assert seen.wrong == []
    assert seen.peak_bytes - before < MAX_GROWTH_BYTES
    assert len(target.controller.calls) > beats, "it still sends heartbeats"
