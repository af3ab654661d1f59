"""A real model beside llama.cpp, from one GGUF file: `python -m benchmarks.real_model --help`.

The default is speed: the arms in turns, medians of the rounds, by the code of `benchmarks.compare`. `--perplexity FILE`
scores a text with each arm, and `--answers N` compares greedy answers to N questions with those of fastserve in float32
(which are transformers': `tests/gguf/test_smollm2.py`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compare import (
    MODEL,
    OURS,
    Arm,
    Load,
    free_port,
    keep_rounds,
    print_table,
    read_rounds,
    run_round,
    serving,
)
from fastserve.errors import StartupError
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.worker.model_source import SMOLLM2, ModelSource, find_model

LLAMA_CPP = "llama.cpp"
SLOTS, CONTEXT = 32, 65536
"""llama.cpp divides its context evenly among its slots."""
CHUNK = 512
"""Tokens that are scored together, the first without a score."""
MAX_TEXT_TOKENS = 4096
ANSWER_TOKENS = 24
REQUEST_TIMEOUT_S = 120.0


# ---- arms -------------------------------------------------------------------------------------------------------


def ours(model: str, dtype: str, name: str = OURS) -> Arm:
    port = free_port()
    command = [sys.executable, "-m", "fastserve.model_worker", "--model-path", model, "--model-names", MODEL]
    command += ["--no-register", "--port", str(port), "--dtype", dtype, "--max-total-tokens", str(CONTEXT)]
    # A chunk for each token, as llama.cpp sends them.
    return Arm(name, [*command, "--stream-interval", "1", "--speculative-method", "off"], port)


def llama_cpp(program: str, file: Path) -> Arm:
    port = free_port()
    command = [program, "-m", str(file), "-t", str(os.cpu_count()), "-np", str(SLOTS), "-c", str(CONTEXT), "-cb"]
    return Arm(LLAMA_CPP, [*command, "--port", str(port)], port, keepalive=False)


def post(arm: Arm, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{arm.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
        return json.load(answer)


# ---- speed ------------------------------------------------------------------------------------------------------


def loads() -> list[Load]:
    def client(concurrency: int, requests: int) -> list[str]:
        counts = ["--concurrency", str(concurrency), "--requests", str(requests), "--prompt-words", "128"]
        return [*counts, "--max-tokens", "64", "--ignore-eos"]

    long = ["--concurrency", "1", "--requests", "3", "--prompt-words", "1000", "--max-tokens", "1", "--ignore-eos"]
    rate = "output_tokens_per_s"
    return [
        Load("1 client, tokens/s", client(1, 4), rate),
        Load("8 clients, tokens/s", client(8, 16), rate),
        Load("32 clients, tokens/s", client(32, 32), rate),
        Load("TTFT of 1,000 words, s", long, "ttft_p50_s", higher_is_better=False),
    ]


def measure_speed(arms: list[Arm], rounds: int, keep: Path | None) -> None:
    found = read_rounds(keep)
    done = max((len(values) for values in found.values()), default=0)
    for seed in range(done + 1, done + rounds + 1):
        run_round(arms, loads(), seed, found)
        keep_rounds(keep, found)
    print_table(arms, loads(), found)


# ---- perplexity -------------------------------------------------------------------------------------------------


def measure_perplexity(arms: list[Arm], source: ModelSource, text: Path) -> None:
    """Print each arm's perplexity, and how far it is from that of the first arm."""
    ids = load_tokenizer(source.folder).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    chunks = [ids[begin : begin + CHUNK] for begin in range(0, min(len(ids), MAX_TEXT_TOKENS), CHUNK)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    print(f"{text}: {sum(map(len, chunks))} tokens in {len(chunks)} chunks")
    first: float | None = None
    for arm in arms:
        score = scores_of_llama_cpp if arm.name == LLAMA_CPP else scores_of_ours
        with serving(arm), ThreadPoolExecutor(4) as pool:
            scores = list(itertools.chain.from_iterable(pool.map(lambda chunk: score(arm, chunk), chunks)))  # noqa: B023
        perplexity = math.exp(-sum(scores) / len(scores))
        first = first or perplexity
        print(f"{arm.name:20} perplexity {perplexity:.4f} ({(perplexity / first - 1) * 100:+.3f} %)", flush=True)


def scores_of_ours(arm: Arm, chunk: list[int]) -> list[float]:
    """Logarithms of the probabilities of all tokens but the first."""
    body = {"model": MODEL, "prompt": chunk, "max_tokens": 0, "echo": True, "logprobs": 0}
    scores: list[float] = post(arm, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    return scores[1:]


def scores_of_llama_cpp(arm: Arm, chunk: list[int]) -> list[float]:
    """The server scores only tokens that it generates: a bias makes it choose the text's next one, and scores are
    those before the bias."""

    def score(length: int) -> float:
        body = {
            "prompt": chunk[:length], "n_predict": 1, "n_probs": 1, "temperature": 0.0, "cache_prompt": True,
            "logit_bias": [[chunk[length], 1e4]],
        }  # fmt: skip
        token = post(arm, "/completion", body)["completion_probabilities"][0]
        if token["id"] != chunk[length]:
            sys.exit(f"llama.cpp chose the token {token['id']} in place of {chunk[length]}")
        return float(token["logprob"])

    return [score(length) for length in range(1, len(chunk))]


# ---- answers ----------------------------------------------------------------------------------------------------


def questions(count: int) -> list[str]:
    """Different questions, the same at each call."""
    return list(itertools.islice(_questions(), count))


def _questions() -> Iterator[str]:
    countries = ("France", "Japan", "Egypt", "Brazil", "Canada", "India", "Norway", "Peru", "Kenya", "Spain")
    things = ("a bicycle", "the moon", "bread", "a library", "rain", "a magnet", "glass", "an island", "paper", "salt")
    animals = ("cat", "whale", "bee", "horse", "owl", "ant", "frog", "shark", "camel", "wolf")
    for number, (country, thing, animal) in enumerate(itertools.product(countries, things, animals)):
        kinds = (
            f"What is the capital of {country}?",
            f"Explain {thing} to a child.",
            f"Where does a {animal} live?",
            f"What is {number + 3} + {7 * number % 90 + 4}?",
            f"Name {number % 4 + 2} things that a traveller takes to {country}.",
            f"Write one sentence about {thing} and a {animal}.",
            f"How do you say '{animal}' in Spanish?",
            f"Write a Python function named {animal}_{number} that returns {number}.",
            f"Is {thing} older than {number + 10} years? Answer shortly.",
            f"Complete: the {animal} went to {country} because",
        )
        yield kinds[number % len(kinds)]


def compare_answers(arms: list[Arm], count: int) -> None:
    """Print the share of each arm's greedy answers that equal those of the first arm."""
    expected: list[str] = []
    for arm in arms:
        with serving(arm), ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda question: ask(arm, question), questions(count)))  # noqa: B023
        expected = expected or answers
        same = sum(answer == other for answer, other in zip(answers, expected, strict=True))
        whose = f"of at most {ANSWER_TOKENS} tokens are those of {arms[0].name}"
        print(f"{arm.name:20} {same} of {count} answers {whose}", flush=True)


def ask(arm: Arm, question: str) -> str:
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
    }  # fmt: skip
    answer: str = post(arm, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="a GGUF file, or a name of one")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of fastserve's activations and dequantized weights")
    parser.add_argument("--llama-server", help="program of llama.cpp's server; without it, fastserve alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="file of rounds: earlier ones are included, and new ones added")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--perplexity", type=Path, metavar="FILE", help="score a text of 2,000 tokens or more")
    kind.add_argument("--answers", type=int, metavar="N", help="compare greedy answers to N questions (1000 at most)")
    args = parser.parse_args()
    # On SIGTERM, unwind the stack so that no servers are left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        source = find_model(args.model, "main")
    except StartupError as error:
        sys.exit(error.message)
    if source.gguf_file is None:
        parser.error("--model must be a GGUF file: llama.cpp reads no other")
    peers = [llama_cpp(args.llama_server, source.gguf_file)] if args.llama_server else []
    mine = ours(args.model, args.dtype)
    exact = ours(args.model, "float32", f"{OURS}, float32")
    if args.perplexity:
        measure_perplexity([exact, mine, *peers], source, args.perplexity)
    elif args.answers:
        compare_answers([exact, mine, *peers], args.answers)
    else:
        measure_speed([mine, *peers], args.rounds, args.keep)


if __name__ == "__main__":
    main()
