"""FastChat's generation parameters as a job: read, checked and translated to OpenAI's names."""

from __future__ import annotations

from typing import Any

from fastserve.errors import InvalidRequestError
from fastserve.openai.body import RequestBounds, invalid, read_fields
from fastserve.worker.caller import Caller
from fastserve.worker.jobs import Job, Prompt
from fastserve.worker.prompts import Echo
from fastserve.worker.runtime import Runtime

_DEFAULT_MAX_NEW_TOKENS = 256
_SAME_NAME = (
    "temperature",
    "repetition_penalty",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "use_beam_search",
    "images",
)
_FIELDS = frozenset({*_SAME_NAME, "model", "best_of", "prompt", "max_new_tokens", "echo", "stop", "stop_token_ids"})


def make_job(runtime: Runtime, body: bytes, caller: Caller) -> tuple[Job, Echo | None]:
    """The job of a generation request, and its prompt if the answer begins with it.

    As on OpenAI's routes, a max_new_tokens that exceeds the context is lowered. Raises RequestError.
    """
    params = read_fields(body, runtime.jobs.settings.bounds, _FIELDS)
    prompt = _prompt(params)
    _check_best_of(params.get("best_of"))
    job = _completion_job(runtime, _completion_fields(runtime, params, prompt), caller)
    if not job.answer.echo:
        return job, None
    # Echo the text as the caller sent it, with the tokens of the restored text, which the model reads.
    sent = Prompt(prompt, job.prompts[0].token_ids, job.prompts[0].params)
    return job, Echo(runtime.jobs.tokenizer, sent, job.answer.logprobs or 0)


def read_prompt(body: bytes, bounds: RequestBounds) -> str:
    """The prompt of a body whose other fields do not matter. Raises InvalidRequestError."""
    return _prompt(read_fields(body, bounds, _FIELDS))


def _completion_job(runtime: Runtime, fields: dict[str, Any], caller: Caller) -> Job:
    try:
        return runtime.jobs.completion_from_fields(fields, caller)
    except InvalidRequestError as error:
        if error.param != "max_tokens":
            raise
        message = error.message.replace("'max_tokens'", "'max_new_tokens'")
        raise InvalidRequestError(message, param="max_new_tokens") from error


def _completion_fields(runtime: Runtime, params: dict[str, Any], prompt: str) -> dict[str, Any]:
    """The fields of a `CompletionRequest` for FastChat's parameters."""
    max_new_tokens = params.get("max_new_tokens")
    return {name: params[name] for name in _SAME_NAME if params.get(name) is not None} | {
        "model": _model(runtime, params.get("model")),
        "prompt": runtime.jobs.encoder.encode_rendered(runtime.conversation.restore(prompt)),
        "max_tokens": _DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        "echo": params.get("echo", True),
        "stop": _without_empty(params.get("stop")),
        "stop_token_ids": _in_vocabulary(params.get("stop_token_ids"), runtime.info.vocab_size),
        "stream": True,
    }


def _model(runtime: Runtime, model: Any) -> str:
    """The request's model. A worker without adapters answers to any name, as FastChat's workers do; one with adapters
    refuses unknown names, which may be an adapter's. Clients need not name a model. Raises ModelNotFoundError.
    """
    adapters, base = runtime.adapters, runtime.jobs.settings.model_names[0]
    if model in (None, "") or not adapters.is_enabled:
        return base
    if not isinstance(model, str):
        raise invalid("model", model, "Give the name of the model or of an adapter.")
    if adapters.resolve(model) is None:
        raise adapters.unknown(model)
    return model


def _prompt(params: dict[str, Any]) -> str:
    prompt = params.get("prompt")
    if prompt is None:
        raise InvalidRequestError(
            "Missing required field 'prompt', a string.", param="prompt", code="missing_required_parameter"
        )
    if not isinstance(prompt, str):
        raise invalid("prompt", prompt, "Give a string.")
    return prompt


def _check_best_of(best_of: Any) -> None:
    if best_of not in (None, 1) or isinstance(best_of, bool):
        raise invalid(
            "best_of", best_of, "This route generates one choice: leave it out, or give 1. /v1/completions has best_of."
        )


def _without_empty(stop: Any) -> Any:
    """FastChat's conversations may have empty stop strings, which OpenAI's schema refuses."""
    if isinstance(stop, list):
        return [text for text in stop if text != ""]
    return None if stop == "" else stop


def _in_vocabulary(stop_token_ids: Any, vocab_size: int) -> Any:
    """Drop ids outside of the vocabulary: FastChat's clients send those of the conversation that they know by the
    model's name, which may be meant for a larger one.
    """
    if not isinstance(stop_token_ids, list):
        return stop_token_ids
    return [item for item in stop_token_ids if not isinstance(item, int) or 0 <= item < vocab_size]
