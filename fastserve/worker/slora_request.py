"""S-LoRA's request (`inputs`, `parameters` and `lora_dir`) as a job: read, checked and translated.

Parameters that are not given have S-LoRA's defaults, not the model's recommended ones. Without `do_sample` the answer
is greedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from fastserve.errors import InvalidRequestError, ModelNotFoundError
from fastserve.observability.text import printable
from fastserve.openai.body import invalid, read_fields, renamed, shown
from fastserve.openai.slora import GenerateParameters, GenerateRequest
from fastserve.worker.caller import Caller
from fastserve.worker.jobs import Job
from fastserve.worker.runtime import Runtime

_FIELDS = frozenset(GenerateRequest.model_fields)
_SAME_NAME = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "ignore_eos")
_TRANSLATED = {"prompt": "inputs", "max_tokens": "max_new_tokens", "stop": "stop_sequences"}
"""Names of S-LoRA for those of a completion request."""
_PARAMETERS = frozenset(GenerateParameters.model_fields)
_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "max_tokens": 16,
}
_MAX_SHOWN_CHARS = 1000
"""Characters of the adapters' names in an error message."""


def make_job(runtime: Runtime, body: bytes, caller: Caller, *, stream: bool) -> tuple[Job, bool]:
    """The job, and whether the whole answer lists its tokens. Raises RequestError."""
    fields = read_fields(body, runtime.jobs.settings.bounds, _FIELDS, frozenset({"inputs"}))
    parameters = _parameters(fields.get("parameters"))
    has_details = _flag(parameters, "return_details")
    request = _DEFAULTS | {name: parameters[name] for name in _SAME_NAME if name in parameters}
    request |= {ours: parameters[theirs] for ours, theirs in _TRANSLATED.items() if theirs in parameters}
    request |= {
        "model": _model(runtime, fields),
        "prompt": _inputs(fields.get("inputs")),
        "include_stop_str_in_output": True,
        "logprobs": 0 if stream or has_details else None,
        "stream": stream,
    }
    is_greedy = not _flag(parameters, "do_sample")
    try:
        job = runtime.jobs.completion_from_fields(request, caller)
    except InvalidRequestError as error:
        raise renamed(error, _TRANSLATED) from error
    return (_greedy(job) if is_greedy else job), has_details


def _greedy(job: Job) -> Job:
    (prompt,) = job.prompts
    params = msgspec.structs.replace(prompt.params, temperature=0.0, top_p=1.0)
    return replace(job, prompts=[replace(prompt, params=params)])


def _parameters(given: Any) -> dict[str, Any]:
    """The parameters that are not null, which is the same as a missing one."""
    if given is not None and not isinstance(given, dict):
        raise invalid("parameters", given, "Give an object.")
    unknown = next((name for name in given or {} if name not in _PARAMETERS), None)
    if unknown is not None:
        known = ", ".join(sorted(_PARAMETERS))
        raise InvalidRequestError(
            f"'parameters' has no field {shown(unknown)}. Leave it out; there are: {known}.", param="parameters"
        )
    return {name: value for name, value in (given or {}).items() if value is not None}


def _inputs(given: Any) -> str:
    if given is None:
        raise InvalidRequestError(
            "Missing required field 'inputs', a string.", param="inputs", code="missing_required_parameter"
        )
    if not isinstance(given, str):
        raise invalid("inputs", given, "Give a string.")
    return given


def _model(runtime: Runtime, fields: Mapping[str, Any]) -> str:
    """The adapter of `lora_dir`, else `model`, else the base model."""
    adapter, model = _adapter(runtime, fields.get("lora_dir")), fields.get("model")
    names = runtime.jobs.settings.model_names
    if model is None:
        return adapter or names[0]
    if not isinstance(model, str):
        raise invalid("model", model, "Give a string.")
    if adapter and model not in names:
        raise runtime.adapters.unknown(model)
    return adapter or model


def _adapter(runtime: Runtime, lora_dir: Any) -> str:
    """The adapter of `lora_dir`; "" for none."""
    if lora_dir is None:
        return ""
    if not isinstance(lora_dir, str):
        raise invalid("lora_dir", lora_dir, "Give a string as in --lora-dirs, or the name of an adapter.")
    name = runtime.adapters.resolve_source(lora_dir)
    if name is None:
        served = printable(", ".join(adapter.name for adapter in runtime.adapters.all()), _MAX_SHOWN_CHARS)
        raise ModelNotFoundError(
            f"The adapter '{printable(lora_dir, 80)}' ('lora_dir') is not served here. Served: {served or 'none'}. "
            "Leave it out for the base model.",
            param="lora_dir",
        )
    return name


def _flag(parameters: dict[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise invalid(name, value, "Give true or false.")
    return value
