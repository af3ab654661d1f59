"""What a batch costs those who wait: time to first token of clients with and without a batch beside them, by turns.

    python -m benchmarks.batches --model FOLDER [--rate 2] [--duration-s 30] [--rounds 3]

A controller, a worker and an API server run. Clients come at random times (a Poisson process) and get streams. The
batch has more requests than can be answered meanwhile; its own rate of answers is shown too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.load import WORDS, percentile, wait_ready
from tests.processes import free_ports

NUM_BATCHED = 5_000
SETTLE_S = 4.0
"""Time before each arm, in which the batch of the arm before ends or that of this one begins."""


@contextmanager
def cluster(model: str) -> Iterator[str]:
    """Start the three services; the address of the API server."""
    controller, worker, server = free_ports(3)
    with tempfile.TemporaryDirectory() as folder:
        here = os.environ | {"XDG_STATE_HOME": folder, "FASTSERVE_CLUSTER_KEY": "benchmark-" + "0" * 40}
        address = f"http://127.0.0.1:{controller}"
        commands = (
            ["controller", "--port", str(controller)],
            [
                *("model_worker", "--port", str(worker), "--controller-address", address, "--model-path", model),
                *("--worker-address", f"http://127.0.0.1:{worker}", "--model-names", "m"),
            ],
            ["openai_api_server", "--port", str(server), "--controller-address", address],
        )
        services = [
            subprocess.Popen([sys.executable, "-m", f"fastserve.{name}", *flags, "--log-level", "warning"], env=here)
            for name, *flags in commands
        ]
        try:
            yield f"http://127.0.0.1:{server}"
        finally:
            for service in reversed(services):
                service.terminate()
            for service in services:
                service.wait()


def body_of(source: random.Random, num_tokens: int) -> dict[str, Any]:
    prompt = " ".join(source.choices(WORDS, k=source.randint(16, 128)))
    return {"model": "m", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}


async def start_batch(http: aiohttp.ClientSession, url: str) -> str:
    source = random.Random(1)
    lines = (
        {"custom_id": str(at), "method": "POST", "url": "/v1/completions", "body": body_of(source, 64)}
        for at in range(NUM_BATCHED)
    )
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", "\n".join(map(json.dumps, lines)).encode(), filename="requests.jsonl")
    async with http.post(url + "/v1/files", data=form) as response:
        response.raise_for_status()
        file_id = (await response.json())["id"]
    asked = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    async with http.post(url + "/v1/batches", json=asked) as response:
        response.raise_for_status()
        return str((await response.json())["id"])


async def answered(http: aiohttp.ClientSession, url: str, batch: str) -> int:
    async with http.get(f"{url}/v1/batches/{batch}") as response:
        return int((await response.json())["request_counts"]["completed"])


async def online(http: aiohttp.ClientSession, url: str, rate: float, duration_s: float, seed: int) -> list[float]:
    """Times to first token of clients that come at random times."""
    source = random.Random(seed)
    found: list[float] = []

    async def one(body: dict[str, Any]) -> None:
        begin = time.perf_counter()
        async with http.post(url + "/v1/completions", json=body | {"stream": True}) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    found.append(time.perf_counter() - begin)
                    break
            await response.read()

    tasks, end = [], time.perf_counter() + duration_s
    while time.perf_counter() < end:
        tasks.append(asyncio.create_task(one(body_of(source, 64))))
        await asyncio.sleep(source.expovariate(rate))
    await asyncio.gather(*tasks)
    return found


async def measure(options: argparse.Namespace, url: str) -> None:
    await wait_ready(url)
    times: dict[str, list[float]] = {"alone": [], "beside a batch": []}
    batched: list[float] = []
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        await online(http, url, options.rate, 5.0, 0)
        for seed in range(1, options.rounds + 1):
            times["alone"] += await online(http, url, options.rate, options.duration_s, 2 * seed)
            batch = await start_batch(http, url)
            await asyncio.sleep(SETTLE_S)
            before, begin = await answered(http, url, batch), time.perf_counter()
            times["beside a batch"] += await online(http, url, options.rate, options.duration_s, 2 * seed + 1)
            batched.append((await answered(http, url, batch) - before) / (time.perf_counter() - begin))
            async with http.post(f"{url}/v1/batches/{batch}/cancel") as response:
                response.raise_for_status()
            await asyncio.sleep(SETTLE_S)
    for percent in (50, 90, 99):
        one, other = (percentile(found, percent) for found in times.values())
        print(f"p{percent} of TTFT: alone {one:.3f} s, beside a batch {other:.3f} s, {other / one:.2f} x")
    print(f"clients: {len(times['alone'])}; answers of the batch: {statistics.median(batched):.2f} a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=lambda text: str(Path(text)))
    parser.add_argument("--rate", type=float, default=2.0, help="clients a second")
    parser.add_argument("--duration-s", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with cluster(options.model) as url:
        asyncio.run(measure(options, url))


if __name__ == "__main__":
    main()
