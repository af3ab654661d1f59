"""Cost of grammars: compiling, masks, and throughput of an engine whose requests all have one.

    python -m benchmarks.grammars --model FOLDER [--requests 32] [--max-tokens 64]

The engine computes the same requests with and without a schema, alternating. Requests with a schema end with it; those
without generate as many tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from llguidance import LLMatcher

from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.settings import EngineConfig
from fastserve.text.grammar import of_json_schema
from fastserve.text.grammar_tokenizer import grammar_tokenizer, parser_limits
from fastserve.text.load_tokenizer import load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 200},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 5}, "minItems": 3},
        "kind": {"enum": ["alpha", "beta", "gamma"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
_MASKS = 200


def measure_masks(folder: Path, vocab_size: int) -> None:
    tokenizer = load_tokenizer(folder)
    begin = time.perf_counter()
    vocabulary = grammar_tokenizer(tokenizer, vocab_size, tokenizer.eos_token_ids)
    print(f"vocabulary of {vocab_size} tokens: {(time.perf_counter() - begin) * 1e3:.0f} ms")
    begin = time.perf_counter()
    matcher = LLMatcher(vocabulary, of_json_schema(SCHEMA), limits=parser_limits(300_000))
    print(f"compiling: {(time.perf_counter() - begin) * 1e3:.2f} ms")
    times = []
    for _ in range(_MASKS):
        begin = time.perf_counter()
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        times.append(time.perf_counter() - begin)
        if matcher.is_stopped():
            matcher.reset()
            continue
        matcher.consume_token((allowed & -allowed).bit_length() - 1)
    times.sort()
    print(f"masks: median {times[len(times) // 2] * 1e6:.0f} us, slowest {times[-1] * 1e6:.0f} us")


def tokens_per_s(core: EngineCore, prompt: list[int], grammar: str, count: int, max_tokens: int, run: int) -> float:
    for at in range(count):
        params = SamplingParams(
            max_tokens,
            temperature=1.0,
            seed=at,
            grammar=grammar,
            stop_token_ids=core.info.eos_token_ids if grammar else (),
        )
        core.add(EngineRequest(f"{run}-{at}", [*prompt, at % 100], params))
    num_tokens, begin = 0, time.perf_counter()
    while core.has_work:
        num_tokens += sum(len(output.token_ids) for output in core.step())
    return num_tokens / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    config = EngineConfig(model_dir=options.model, tokenizer_dir=options.model, device="cpu", max_total_tokens=16384)
    core = build_core(config, lambda *_: None)
    measure_masks(Path(options.model), core.info.vocab_size)
    prompt = list(range(100, 132))
    for run in range(options.rounds):
        grammar = of_json_schema(SCHEMA)
        speeds = [
            tokens_per_s(core, prompt, text, options.requests, options.max_tokens, 2 * run + at)
            for at, text in enumerate(("", grammar))
        ]
        print(f"tokens/s without {speeds[0]:.1f}, with schemas {speeds[1]:.1f}: {speeds[1] / speeds[0]:.2f} x")


if __name__ == "__main__":
    main()
