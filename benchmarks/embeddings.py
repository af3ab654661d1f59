"""Texts embedded a second: a worker with 32 clients beside sentence-transformers' encode of the same texts, by turns.

    python -m benchmarks.embeddings FOLDER [--clients 32] [--texts 256] [--rounds 3]

FOLDER holds a model with sentence-transformers' files. sentence-transformers gets all texts in one call (batches of 32,
sorted by length), and again one text a call, as 32 clients would send them to a server that does not batch.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np

from benchmarks.load import wait_ready
from fastserve.engine.pooling.forward import OWN_ATTENTION
from tests.processes import free_ports

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "is",
    "was",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
    "had",
    "not",
    "are",
    "but",
    "from",
    "or",
    "have",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "her",
    "all",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "more",
    "no",
    "if",
    "out",
    "so",
    "said",
    "what",
    "up",
    "its",
    "about",
    "into",
    "than",
    "them",
]
LENGTHS = (4, 6, 8, 12, 16, 24, 40, 80, 140)
"""Words of the texts."""


def make_texts(count: int) -> list[str]:
    source = random.Random(0)
    return [" ".join(source.choice(WORDS) for _ in range(source.choice(LENGTHS))) for _ in range(count)]


async def ask(url: str, texts: list[str], num_clients: int) -> tuple[float, dict[str, Any]]:
    """Seconds, and the vectors by text. Each client sends text after text, and asks for base64 as OpenAI's does."""
    found: dict[str, Any] = {}
    left = iter(texts)

    async def client(http: aiohttp.ClientSession) -> None:
        for text in left:
            body = {"model": "m", "input": text, "encoding_format": "base64"}
            async with http.post(url + "/v1/embeddings", json=body) as response:
                response.raise_for_status()
                vector = (await response.json())["data"][0]["embedding"]
                found[text] = np.frombuffer(base64.b64decode(vector), dtype=np.float32)

    async with aiohttp.ClientSession() as http:
        begin = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(num_clients)))
        return time.perf_counter() - begin, found


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(options.folder, device="cpu", model_kwargs={"attn_implementation": OWN_ATTENTION})
    texts = make_texts(options.texts)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "fastserve.model_worker", "--model-path", options.folder, "--model-names", "m"]
    worker = subprocess.Popen([*command, "--no-register", "--insecure", "--port", str(port), "--log-level", "warning"])
    try:
        asyncio.run(wait_ready(url))
        asyncio.run(ask(url, texts[:64], options.clients))
        theirs.encode(texts[:64])
        seconds: dict[str, list[float]] = {"worker": [], "encode, one call": [], "encode, one by one": []}
        worst = 0.0
        for _ in range(options.rounds):
            taken, found = asyncio.run(ask(url, texts, options.clients))
            seconds["worker"].append(taken)
            seconds["encode, one call"].append(timed(lambda: theirs.encode(texts)))
            seconds["encode, one by one"].append(timed(lambda: [theirs.encode(text) for text in texts]))
            expected = theirs.encode(texts)
            worst = max(worst, float(np.abs(np.array([found[text] for text in texts]) - expected).max()))
    finally:
        worker.terminate()
        worker.wait()
    ours = statistics.median(seconds["worker"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:20} {options.texts / median:7.0f} texts/s   worker: {median / ours:.2f} x")
    print(f"largest difference of a number: {worst:.1e}")


if __name__ == "__main__":
    main()
