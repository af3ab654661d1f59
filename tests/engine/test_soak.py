"""A worker at saturation for a while: nothing is lost, memory stays flat, speed stays.

5 seconds by default; FASTSERVE_SOAK_S=3600 makes it an hour.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil
import pytest

from tests.trio.processes import Service

SOAK_S = float(os.environ.get("FASTSERVE_SOAK_S", "5"))
NUM_CLIENTS = 48
"""More than the engine runs at once: some always wait."""
MIN_SPEED = 0.85 if SOAK_S >= 600 else 0.5
"""Minimum ratio of the last third's tokens per second to the first third's. Short runs beside other work are noisy."""
MAX_GROWTH = 1.04 if SOAK_S >= 120 else 1.08
"""Maximum growth of resident memory from the second third to the last: caches fill before, in short runs later too."""
QUESTIONS = ["What is 7 + 5?", "Hello!", "Which port does the controller use?", "Tell me a story about a fox."]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # The KV cache is small enough to be full all the time, and so is the prefix cache.
    flags = ["--no-register", "--max-total-tokens", "2048", "--max-num-seqs", "32"]
    service = Service("worker", "model_worker", flags, tmp_path_factory.mktemp("soak"))
    service.start()
    try:
        service.wait_serving("/ready")
        yield service
    finally:
        service.stop()


@dataclass
class Soak:
    """Results of the clients."""

    http: aiohttp.ClientSession
    url: str
    until: float
    outcomes: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    """Greedy answers, by request: the same request must bring the same answer every time."""

    async def client(self, rng: random.Random) -> None:
        while time.monotonic() < self.until and len(self.troubles) < 5:
            if rng.random() < 0.2:
                await asyncio.sleep(rng.expovariate(20))
            body = make_request(rng)
            leaves = rng.random() < 0.2
            patience_s = rng.uniform(0.0, 0.5) if leaves and not body["stream"] else 120.0
            try:
                outcome = await self.ask(body, patience_s, rng.randint(1, 6) if leaves else None)
            except (aiohttp.ClientError, AssertionError) as error:
                self.troubles.append(f"{body}: {error!r}")
            except TimeoutError:
                if patience_s == 120.0:
                    self.troubles.append(f"{body}: no answer in {patience_s} s")
                self.outcomes["gave up waiting"] += 1
            else:
                self.outcomes[outcome] += 1

    async def ask(self, body: dict[str, Any], patience_s: float, leave_after: int | None) -> str:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        async with asyncio.timeout(patience_s), self.http.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            if not body["stream"]:
                answer = await response.json()
                self.check(body, [read_choice(choice) for choice in answer["choices"]], answer["usage"])
                return "whole"
            texts: dict[int, str] = {}
            usage: dict[str, int] = {}
            chunks = 0
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]\n":
                    self.check(body, [texts[index] for index in sorted(texts)], usage)
                    return "stream"
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    texts[choice["index"]] = texts.get(choice["index"], "") + read_choice(choice)
                usage = chunk.get("usage") or usage
                chunks += 1
                if chunks == leave_after:
                    return "left the stream"
        raise AssertionError("the stream ended without [DONE]")

    def check(self, body: dict[str, Any], texts: list[str], usage: dict[str, int]) -> None:
        assert len(texts) == body.get("n", 1)
        assert 1 <= usage["completion_tokens"] <= len(texts) * body["max_tokens"]
        if body.get("ignore_eos"):
            assert usage["completion_tokens"] == len(texts) * body["max_tokens"]
        if body["temperature"] == 0:
            key = json.dumps({name: value for name, value in body.items() if not name.startswith("stream")})
            assert self.known.setdefault(key, texts[0]) == texts[0], "the same request brought another answer"


def read_choice(choice: dict[str, Any]) -> str:
    message = choice.get("message") or choice.get("delta")
    return str((choice.get("text") if message is None else message.get("content")) or "")


def make_request(rng: random.Random) -> dict[str, Any]:
    """Long and short, chats and plain prompts, greedy and sampled in many ways."""
    stream = rng.random() < 0.6
    body: dict[str, Any] = {"model": "fastserve-demo", "stream": stream, "temperature": 0.0}
    if stream:
        body["stream_options"] = {"include_usage": True}
    kind = rng.random()
    if kind < 0.5:
        body |= {"messages": [{"role": "user", "content": rng.choice(QUESTIONS)}], "max_tokens": rng.choice((4, 40))}
    elif kind < 0.8:
        words = random.Random(rng.randrange(30)).choices(QUESTIONS, k=rng.choice((1, 3, 12)))
        body |= {"prompt": " ".join(words), "max_tokens": rng.choice((1, 60, 250)), "ignore_eos": True}
    else:
        body |= {
            "prompt": "".join(rng.choices("abcdefgh ", k=rng.randint(1, 900))),
            "max_tokens": rng.randint(1, 100),
            "temperature": rng.uniform(0.2, 1.5),
            "top_p": rng.choice((1.0, 0.7)),
            "top_k": rng.choice((-1, 0, 20)),
            "presence_penalty": rng.choice((0.0, 0.6)),
            "n": rng.choice((1, 1, 3)),
            "seed": rng.randrange(1000),
            "logprobs": rng.choice((None, 3)),
        }
    return body


@dataclass(frozen=True)
class Sample:
    at: float
    rss: dict[str, int]
    generated: float
    kv_usage: float


async def metrics(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with http.get(url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def idle_metrics(http: aiohttp.ClientSession, worker: Service) -> dict[str, float]:
    """Wait until nothing is held, and until what has just been let go is counted."""
    names = (
        "worker_requests_running", "worker_requests_waiting", "engine_num_requests_running",
        "engine_num_requests_waiting", "engine_num_used_blocks",
    )  # fmt: skip
    before: dict[str, float] = {}
    async with asyncio.timeout(10):
        while True:
            seen = await metrics(http, worker.address)
            counts = {name: value for name, value in seen.items() if name.startswith("fastserve_worker_requests")}
            if counts == before and not any(seen[f"fastserve_{name}"] for name in names):
                return seen
            before = counts
            await asyncio.sleep(0.2)


async def watch(http: aiohttp.ClientSession, worker: Service, until: float) -> list[Sample]:
    pids = {"worker": worker.process.pid, "engine": worker.engine_pid()}
    samples = []
    while time.monotonic() < until:
        seen = await metrics(http, worker.address)
        rss = {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}
        generated, usage = (
            seen[f"fastserve_engine_{name}"] for name in ("generation_tokens_total", "kv_cache_usage_perc")
        )
        samples.append(Sample(time.monotonic(), rss, generated, usage))
        await asyncio.sleep(max(0.25, SOAK_S / 1000))
    return samples


def thirds(samples: list[Sample]) -> list[list[Sample]]:
    size = len(samples) // 3
    assert size >= 5, "too few samples to compare"
    return [samples[:size], samples[size : 2 * size], samples[2 * size :]]


def speed(samples: list[Sample]) -> float:
    return (samples[-1].generated - samples[0].generated) / (samples[-1].at - samples[0].at)


@pytest.mark.timeout(SOAK_S + 150)
async def test_soak(worker: Service) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        until = time.monotonic() + SOAK_S
        soak = Soak(http, worker.address, until)
        engine_pid = worker.engine_pid()
        watching = asyncio.create_task(watch(http, worker, until))
        await asyncio.gather(*(soak.client(random.Random(number)) for number in range(NUM_CLIENTS)))
        samples = await watching
        assert not soak.troubles, f"{len(soak.troubles)} requests failed, the first: {soak.troubles[0]}"

        after = await idle_metrics(http, worker)
    assert worker.engine_pid() == engine_pid, "the engine was started again"
    assert all(soak.outcomes[kind] for kind in ("whole", "stream", "left the stream", "gave up waiting")), soak.outcomes
    ended = sum(value for name, value in after.items() if name.startswith("fastserve_worker_requests_total"))
    sent = sum(soak.outcomes.values())
    # Who gave up at once may never have been heard.
    assert sent - soak.outcomes["gave up waiting"] <= ended <= sent, "each request ends once"

    first, second, last = thirds(samples)
    report = f"{dict(soak.outcomes)}; tokens/s by thirds: {[round(speed(part)) for part in (first, second, last)]}"
    usage = statistics.median(sample.kv_usage for sample in samples)
    preemptions = after["fastserve_engine_num_preemptions_total"]
    report += f"; KV cache in use: {usage:.0%}; preemptions: {preemptions:.0f}"
    for name in ("worker", "engine"):
        sizes = [statistics.median(sample.rss[name] for sample in part) for part in (first, second, last)]
        report += f"; {name} MB: {[round(size / 1e6, 1) for size in sizes]}"
        assert sizes[2] < MAX_GROWTH * sizes[1], report
    print(report)
    assert usage > 0.5, report
    assert preemptions > 0, report
    assert after["fastserve_engine_prefix_cache_hits_total"] > 0
    assert speed(last) >= MIN_SPEED * speed(first), report
