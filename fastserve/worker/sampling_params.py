"""From a request to complete sampling params for the engine.

A parameter comes from the request, else from the model's generation_config.json, else from the default of
SamplingParams. Fields have the same names in all three, so only those that need more are named here. With
`"do_sample": false` in generation_config.json, the default temperature is 0 (greedy).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastserve.engine.contract import SamplingParams
from fastserve.openai.body import invalid
from fastserve.openai.generation import GenerationRequest
from fastserve.text.model_files import read_json

SEED_MASK = 2**63 - 1
SamplingDefaults = Mapping[str, float]
"""Values by the names of SamplingParams' fields."""
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
_GREEDY_TOP_P = 1e-8
_GREEDY_TEMPERATURE = 1e-5


def read_defaults(folder: Path) -> SamplingDefaults:
    """Sampling params recommended by a model folder's generation_config.json."""
    config = read_json(folder / "generation_config.json")
    if config.get("do_sample") is False:
        config = {"repetition_penalty": config.get("repetition_penalty"), "temperature": 0.0}
    return {name: config[name] for name in _RECOMMENDED if isinstance(config.get(name), int | float)}


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
    bad_token_ids: tuple[tuple[int, ...], ...] = (),
    grammar: str = "",
) -> SamplingParams:
    """`seed`: for requests without one. `grammar`: of the answer (the request's field of that name is one of several).

    Raises InvalidRequestError for ids outside of the vocabulary."""
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        for token_id in getattr(request, name) or ():
            if not 0 <= token_id < vocab_size:
                raise invalid(name, token_id, f"Token ids of this model run from 0 to {vocab_size - 1}.")
    names = [name for name in SamplingParams.__struct_fields__ if name != "grammar"]
    requested = {name: getattr(request, name, None) for name in names}
    values: dict[str, Any] = {**defaults, **{name: value for name, value in requested.items() if value is not None}}
    end_token_ids = () if request.ignore_eos else eos_token_ids
    values |= {
        "max_tokens": max_tokens,
        "top_k": max(0, values.get("top_k", 0)),
        "seed": values.get("seed", seed) & SEED_MASK,
        "min_tokens": min(values.get("min_tokens", 0), max_tokens),
        "stop_token_ids": tuple(dict.fromkeys([*values.get("stop_token_ids", ()), *end_token_ids])),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "bad_token_ids": bad_token_ids,
        "grammar": grammar,
    }
    params = SamplingParams(**values)
    if params.temperature < _GREEDY_TEMPERATURE or params.top_p < _GREEDY_TOP_P or params.top_k == 1:
        return msgspec.structs.replace(params, temperature=0.0, top_p=1.0)
    return params
