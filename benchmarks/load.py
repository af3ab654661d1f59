"""A closed-loop load client for any OpenAI-compatible server: `python -m benchmarks.load --help`.

Each of `--concurrency` clients sends one streaming request after the other, with prompts of a fixed number of words and
answers of a fixed number of tokens, and one JSON row is printed: output tokens per second, time to first token (TTFT),
gaps between chunks, errors. A figure counts only as a ratio to another server measured in the same run, with the arms
interleaved: the machine's noise is large.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

WORDS = [
    "self",
    "return",
    "value",
    "import",
    "class",
    "list",
    "index",
    "string",
    "file",
    "path",
    "error",
    "test",
    "name",
]
"""One token each for most tokenizers."""


@dataclass
class Sample:
    ttft_s: float
    total_s: float
    num_tokens: int
    gaps_s: list[float]


@dataclass
class Outcome:
    samples: list[Sample] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def make_prompt(args: argparse.Namespace, index: int) -> str:
    """Depends on seed and index only. The first `--shared-prefix` words are common to all requests."""
    shared, own = random.Random(args.seed), random.Random(f"{args.seed}-{index}")
    words = [shared.choice(WORDS) for _ in range(args.shared_prefix)]
    return " ".join(words + [own.choice(WORDS) for _ in range(args.prompt_words)])


def brings_token(choice: dict[str, Any]) -> bool:
    """A chat's first event may only state the role. Text may be empty: a token can be part of a character."""
    return "text" in choice or "content" in choice.get("delta", {}) or choice.get("finish_reason") is not None


def adapter_fields(args: argparse.Namespace, client: int) -> dict[str, Any]:
    """The fields of a client's requests that name its own adapter, or the model."""
    if args.adapter_prefix is not None:
        return {"model": f"{args.adapter_prefix}{client}"}
    if args.adapter_numbers:
        return {"model": args.model, "lora": [{"id": client, "scale": 1.0}]}
    return {"model": args.model}


async def send(
    session: aiohttp.ClientSession, args: argparse.Namespace, client: int, index: int, outcome: Outcome
) -> None:
    body: dict[str, Any] = {
        **adapter_fields(args, client),
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.ignore_eos:
        body |= {"ignore_eos": True, "min_tokens": args.max_tokens}
    prompt = make_prompt(args, index)
    route = "chat/completions" if args.chat else "completions"
    body |= {"messages": [{"role": "user", "content": prompt}]} if args.chat else {"prompt": prompt}
    begin = time.perf_counter()
    times: list[float] = []
    num_tokens = 0
    try:
        async with session.post(f"{args.base_url}/{route}", json=body) as response:
            if response.status != 200:
                outcome.errors.append(f"{response.status}: {(await response.text())[:200]}")
                return
            async for line in response.content:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    outcome.errors.append(str(event["error"])[:200])
                    return
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                if any(brings_token(choice) for choice in event["choices"]):
                    times.append(time.perf_counter())
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.errors.append(f"{type(error).__name__}: {error}")
        return
    if not times:
        outcome.errors.append("the answer was empty")
        return
    gaps = [after - before for before, after in itertools.pairwise(times)]
    outcome.samples.append(Sample(times[0] - begin, time.perf_counter() - begin, num_tokens or len(times), gaps))


async def wait_ready(url: str, timeout_s: float = 120.0) -> None:
    """Wait until a service says that it can answer."""
    async with aiohttp.ClientSession() as http, asyncio.timeout(timeout_s):
        while True:
            try:
                async with http.get(url + "/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else float("nan")


def summarise(args: argparse.Namespace, outcome: Outcome, wall_s: float) -> dict[str, Any]:
    samples = outcome.samples
    ttfts = [sample.ttft_s for sample in samples]
    gaps = [gap for sample in samples for gap in sample.gaps_s]
    num_tokens = sum(sample.num_tokens for sample in samples)
    return {
        "label": args.label,
        "concurrency": args.concurrency,
        "ok": len(samples),
        "errors": len(outcome.errors),
        "wall_s": round(wall_s, 2),
        "output_tokens_per_s": round(num_tokens / wall_s, 1),
        "requests_per_s": round(len(samples) / wall_s, 2),
        "tokens_per_answer": round(num_tokens / len(samples), 1) if samples else 0,
        "ttft_p50_s": round(percentile(ttfts, 50), 4),
        "ttft_p99_s": round(percentile(ttfts, 99), 4),
        "gap_p50_s": round(percentile(gaps, 50), 5),
        "gap_p99_s": round(percentile(gaps, 99), 5),
        "mean_s": round(statistics.mean(sample.total_s for sample in samples), 3) if samples else None,
    }


async def run(args: argparse.Namespace) -> int:
    outcome = Outcome()
    remaining = iter(range(args.requests))
    headers = {"Authorization": f"Bearer {args.api_key}"}
    connector = aiohttp.TCPConnector(limit=0, force_close=args.no_keepalive)
    timeout = aiohttp.ClientTimeout(total=args.timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:

        async def client(number: int) -> None:
            for index in remaining:
                await send(session, args, number, index, outcome)

        begin = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(args.concurrency)))
        wall_s = time.perf_counter() - begin
    print(json.dumps(summarise(args, outcome, wall_s)))
    for error in outcome.errors[:3]:
        print(f"error: {error}", file=sys.stderr)
    return 1 if outcome.errors else 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Closed-loop load on an OpenAI-compatible server; prints a JSON row.")
    parser.add_argument("--base-url", default="http://localhost:8888/v1")
    parser.add_argument("--model", default="fastserve-demo")
    parser.add_argument("--adapter-prefix", help="client 0 asks for the adapter of this name and 0, and so on")
    parser.add_argument(
        "--adapter-numbers", action="store_true", help="client 0 asks for adapter 0, in the way of llama.cpp, and so on"
    )
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--label", default="")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--shared-prefix", type=int, default=0, help="words that all prompts begin with")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--chat", action="store_true", help="/chat/completions instead of /completions")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of exactly --max-tokens tokens")
    parser.add_argument("--no-keepalive", action="store_true", help="a connection for each request")
    sys.exit(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
