"""From what a client asked for to the engine's SamplingParams, in which nothing is left open.

Defaults: temperature 1 and top_p 1 as OpenAI's, unless the model's generation_config.json recommends other values of
temperature, top_p, top_k, min_p, typical_p or repetition_penalty: these are what its makers tested it with. A file that
says `"do_sample": false` recommends greedy answers, so the temperature is 0 for requests that do not say one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastserve.engine.contract import SamplingParams
from fastserve.openai.body import invalid
from fastserve.openai.sampling import GenerationRequest
from fastserve.text.model_files import read_json

SEED_MASK = 2**63 - 1
ValueT = TypeVar("ValueT")
_GREEDY_TOP_P = 1e-8
_GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingDefaults:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0


def read_defaults(folder: Path) -> SamplingDefaults:
    """What generation_config.json of a model folder recommends."""
    config = read_json(folder / "generation_config.json")
    if config.get("do_sample") is False:
        config = {"repetition_penalty": config.get("repetition_penalty"), "temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
    return SamplingDefaults(**{name: config[name] for name in names if isinstance(config.get(name), int | float)})


def resolve(
    request: GenerationRequest,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    seed: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    eos_token_ids: Iterable[int],
    vocab_size: int,
) -> SamplingParams:
    """`seed` is used when the request brings none. Raises InvalidRequestError for ids outside of the vocabulary."""
    for name, ids in (("stop_token_ids", request.stop_token_ids or ()), ("logit_bias", request.logit_bias or {})):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise invalid(name, token_id, f"Token ids of this model run from 0 to {vocab_size - 1}.")
    temperature = _or(request.temperature, defaults.temperature)
    top_p = _or(request.top_p, defaults.top_p)
    greedy = temperature < _GREEDY_TEMPERATURE or top_p < _GREEDY_TOP_P
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        top_p=1.0 if greedy else top_p,
        top_k=max(0, _or(request.top_k, defaults.top_k)),
        min_p=_or(request.min_p, defaults.min_p),
        typical_p=_or(request.typical_p, defaults.typical_p),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias or {},
        seed=_or(request.seed, seed) & SEED_MASK,
        min_tokens=min(request.min_tokens or 0, max_tokens),
        stop_token_ids=tuple(
            dict.fromkeys([*(request.stop_token_ids or ()), *(() if request.ignore_eos else eos_token_ids)])
        ),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _or(value: ValueT | None, default: ValueT) -> ValueT:
    return default if value is None else value
