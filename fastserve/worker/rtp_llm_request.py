"""rtp-llm's request (`prompt` or `prompt_batch`, and `generate_config`) as a job: read, checked and translated.

As with rtp-llm, fields of generate_config may also stand beside the prompt. A field that would change the answer and
cannot be honoured is refused by its name; the value that rtp-llm has without it is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.openai.body import RequestBounds, invalid, read_fields, renamed, shown
from fastserve.worker.caller import Caller
from fastserve.worker.jobs import Job
from fastserve.worker.runtime import Runtime

DEFAULT_MAX_NEW_TOKENS = 1000
_CONFIGS = ("generate_config", "generation_config")
_TRANSLATED = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "random_seed": "seed",
    "stop_words_str": "stop",
    "print_stop_words": "include_stop_str_in_output",
}
"""Names of a completion request for those of rtp-llm."""
_OWN = frozenset({
    *("max_new_tokens", "gen_length", "num_return_sequences", "stop_words_list", "yield_generator"),
    *("return_incremental", "adapter_name"),
})  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = (
    {
        "num_beams": (1, 0),
        "calculate_loss": (0, False),
        "timeout_ms": (-1, 0),
        "no_repeat_ngram_size": (0,),
        "request_format": ("raw",),
        "max_input_tokens": (32000,),
        "md5_value": ("",),
        "custom_prop": ("", "{}"),
        "sp_advice_prompt": ("",),
        "tool_call_message_extract_strategy": ("default",),
        "can_use_pd_separation": (True, False),
        "force_disable_sp_run": (True, False),
        "using_hf_sampling": (True, False),
        "chat_id": (),
    }
    | dict.fromkeys(
        (
            *("return_logits", "output_logits", "return_hidden_states", "output_hidden_states", "return_input_ids"),
            *(
                "output_input_ids",
                "return_output_ids",
                "return_cum_log_probs",
                "return_all_probs",
                "return_softmax_probs",
            ),
            *("sp_edit",),
        ),
        (False,),
    )
    | dict.fromkeys(
        (
            *("top_p_decay", "top_p_min", "top_p_reset_ids", "bad_words_list", "eos_token_id", "pad_token_id"),
            *("bos_token_id", "task_id", "select_tokens_str", "select_tokens_id", "sp_advice_prompt_token_ids"),
            *("images", "urls", "functions"),
        ),
        ([],),
    )
)
"""Fields that are not supported, with the values that change nothing."""
_KNOWN = frozenset({"prompt", "text", "prompt_batch", "messages", *_CONFIGS, *_TRANSLATED, *_OWN, *_NEUTRAL})
_LONG = frozenset({"prompt", "text", "prompt_batch"})


@dataclass(frozen=True)
class AnswerShape:
    """The form of the answer, which depends on how the request was made."""

    is_batch: bool
    """prompt_batch: `response_batch`, an entry for each prompt."""
    has_sequences: bool
    """num_return_sequences above 0: `response` is a list."""
    is_incremental: bool
    """return_incremental: an event has the next text, not the whole text so far."""


def make_job(runtime: Runtime, body: bytes, caller: Caller) -> tuple[Job, AnswerShape]:
    """Raises RequestError."""
    fields = read_fields(body, runtime.jobs.settings.bounds, _KNOWN, _LONG)
    if fields.get("messages") is not None:
        raise UnsupportedParameterError(
            "'messages' is not supported here. Send chats to /v1/chat/completions.", param="messages"
        )
    config = _generate_config(fields)
    _refuse_unsupported(config)
    num_sequences = _count(config, "num_return_sequences", 0)
    prompts, is_batch = _prompts(fields)
    stream = _flag(config, "yield_generator")
    shape = AnswerShape(is_batch, num_sequences > 0, _flag(config, "return_incremental"))
    if shape.is_incremental and not stream:
        raise invalid("return_incremental", True, "It is allowed with yield_generator=true only.")
    token_limit = config.get("gen_length", config.get("max_new_tokens"))
    request = {_TRANSLATED[name]: value for name, value in config.items() if name in _TRANSLATED} | {
        "model": _adapter_name(config) or runtime.jobs.settings.model_names[0],
        "prompt": prompts,
        "max_tokens": DEFAULT_MAX_NEW_TOKENS if token_limit is None else token_limit,
        "n": max(1, num_sequences),
        "stream": stream,
    }
    stops = [*_texts(config, "stop_words_str"), *_decoded_stops(runtime, config)]
    job = _translated(runtime, request | {"stop": stops or None}, caller)
    return job, shape


def read_text(body: bytes, bounds: RequestBounds) -> str:
    """The prompt of a request to /tokenizer/encode. Raises InvalidRequestError."""
    fields = read_fields(body, bounds, frozenset({"prompt", "return_offsets_mapping"}), _LONG)
    prompts, _ = _prompts({"prompt": fields.get("prompt")})
    if not isinstance(prompts, str):
        raise invalid("prompt", prompts, "Give a string.")
    if _flag(fields, "return_offsets_mapping"):
        raise UnsupportedParameterError("'return_offsets_mapping' is not supported.", param="return_offsets_mapping")
    return prompts


def _generate_config(fields: dict[str, Any]) -> dict[str, Any]:
    """generate_config joined with the fields beside it, which win. Null is the same as a missing field."""
    config: dict[str, Any] = {}
    for name in _CONFIGS:
        given = fields.get(name)
        if given is not None and not isinstance(given, dict):
            raise invalid(name, given, "Give an object.")
        config |= given or {}
    unknown = next((name for name in config if name not in _KNOWN), None)
    if unknown is not None:
        raise InvalidRequestError(f"generate_config has no field {shown(unknown)}.", param="generate_config")
    config |= {name: value for name, value in fields.items() if name not in _CONFIGS and name not in _LONG}
    return {name: value for name, value in config.items() if value is not None}


def _refuse_unsupported(config: dict[str, Any]) -> None:
    for name, value in config.items():
        if name in _NEUTRAL and name != "chat_id" and value not in _NEUTRAL[name]:
            neutral = " or ".join(shown(item) for item in _NEUTRAL[name]) or "null"
            raise UnsupportedParameterError(
                f"'{name}' is not supported: {shown(value)}. Leave it out, or give {neutral}.", param=name
            )


def _adapter_name(config: dict[str, Any]) -> str:
    """The adapter of `adapter_name`, a string or a list with one; "" for none."""
    value = config.get("adapter_name")
    if isinstance(value, list) and len(value) <= 1:
        value = value[0] if value else ""
    if value is not None and not isinstance(value, str):
        raise invalid("adapter_name", value, "Give the name of one adapter.")
    return value or ""


def _prompts(fields: dict[str, Any]) -> tuple[str | list[str], bool]:
    """The prompts, and whether they came as a batch."""
    batch = fields.get("prompt_batch")
    if batch is not None:
        if not isinstance(batch, list) or not batch or not all(isinstance(item, str) for item in batch):
            raise invalid("prompt_batch", batch, "Give an array of strings.")
        return batch, True
    for name in ("prompt", "text"):
        prompt = fields.get(name)
        if prompt is None:
            continue
        if isinstance(prompt, str):
            return prompt, False
        if isinstance(prompt, list) and prompt and all(isinstance(item, str) for item in prompt):
            return prompt, len(prompt) > 1
        raise invalid(name, prompt, "Give a string, or an array of strings.")
    raise InvalidRequestError(
        "Missing required field 'prompt', a string, or 'prompt_batch', an array of strings.",
        param="prompt",
        code="missing_required_parameter",
    )


def _decoded_stops(runtime: Runtime, config: dict[str, Any]) -> list[str]:
    """The texts of `stop_words_list`, whose entries are lists of token ids."""
    lists = config.get("stop_words_list", [])
    if not isinstance(lists, list) or not all(isinstance(ids, list) and ids for ids in lists):
        raise invalid("stop_words_list", lists, "Give an array of non-empty arrays of token ids.")
    for ids in lists:
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise invalid("stop_words_list", ids, "Give an array of arrays of token ids, which are integers.")
        runtime.jobs.encoder.check_token_ids(ids, "stop_words_list")
    data = runtime.jobs.tokenizer.token_bytes
    return [b"".join(map(data, ids)).decode(errors="replace") for ids in lists]


def _texts(config: dict[str, Any], name: str) -> list[str]:
    value = config.get(name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise invalid(name, value, "Give an array of non-empty strings.")
    return value


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, value, "Give true or false.")
    return bool(value)


def _count(config: dict[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise invalid(name, value, "Give a whole number, 0 or more.")
    return value


def _translated(runtime: Runtime, request: dict[str, Any], caller: Caller) -> Job:
    """The job of a completion request; its errors name rtp-llm's fields."""
    try:
        return runtime.jobs.completion_from_fields(request, caller)
    except InvalidRequestError as error:
        names = {ours: theirs for theirs, ours in _TRANSLATED.items()} | {"max_tokens": "max_new_tokens"}
        names |= {"n": "num_return_sequences"}
        raise renamed(error, names) from error
