"""Requests of Ollama's `/api/chat` and `/api/generate` in the fields of a chat or completion request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.openai.answers import encode_json
from fastserve.openai.body import RequestBounds, invalid, join, read_fields, renamed, shown, validate
from fastserve.openai.generation import MAX_COUNT
from fastserve.openai.ollama import OllamaChatRequest, OllamaGenerateRequest, OllamaRequest, untagged
from fastserve.worker.adapters import ServedAdapters
from fastserve.worker.caller import Caller
from fastserve.worker.jobs import Job, JobMaker

RequestT = TypeVar("RequestT", bound=OllamaRequest)
Fields = dict[str, Any]

_LONG_FIELDS = frozenset({"messages", "prompt", "tools"})
_ROLES = frozenset({"system", "user", "assistant", "tool"})
_SAME_OPTIONS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty"),
)
_OPTIONS = {**{name: name for name in _SAME_OPTIONS}, "repeat_penalty": "repetition_penalty"}
"""Fields of a chat request by Ollama's options."""
RUNNER_OPTIONS = frozenset(
    {
        *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram", "f16_kv"),
        *("logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only", "repeat_last_n", "penalize_newline"),
        *("mirostat_tau", "mirostat_eta"),
    }
)
"""Options about how Ollama runs a model, which have no effect here."""
_UNSUPPORTED_OPTIONS = {"mirostat": 0, "tfs_z": 1}
"""Options that would change the answer, with the value that leaves it as it is."""
_EFFORTS = ("low", "medium", "high", "max")
_MAX_KEEP_ALIVE_CHARS = 64
_THEIR_NAMES = {
    **{ours: f"options.{theirs}" for theirs, ours in _OPTIONS.items()},
    "max_tokens": "options.num_predict",
    "response_format": "format",
    "response_format.json_schema.schema": "format",
    "reasoning_effort": "think",
    "chat_template_kwargs": "think",
}


@dataclass(frozen=True)
class OllamaJob:
    job: Job | None
    """None: the request only loads or unloads the model, which has no effect."""
    model: str
    """As the client named it."""
    stream: bool
    done_reason: str = "load"
    """`done_reason` of the answer, if nothing is to be generated."""


def make_chat_job(jobs: JobMaker, adapters: ServedAdapters, body: bytes, caller: Caller) -> OllamaJob:
    """Raises RequestError."""
    request = _parse(OllamaChatRequest, body, jobs.settings.bounds)
    model = find_model(request.model, adapters)
    if not request.messages:
        return _load(request)
    fields = _common_fields(request) | {"model": model, "messages": chat_messages(request.messages)}
    if request.tools:
        fields["tools"] = request.tools
    return _job(request, _call(jobs.chat_from_fields, _with_chat_logprobs(fields, request), caller))


def make_generate_job(jobs: JobMaker, adapters: ServedAdapters, body: bytes, caller: Caller) -> OllamaJob:
    """Raises RequestError."""
    request = _parse(OllamaGenerateRequest, body, jobs.settings.bounds)
    _refuse_unsupported(request)
    model = find_model(request.model, adapters)
    if not request.prompt:
        return _load(request)
    fields = _common_fields(request) | {"model": model}
    if not request.raw and jobs.has_chat_template:
        system = [{"role": "system", "content": request.system}] if request.system else []
        fields["messages"] = [*system, {"role": "user", "content": request.prompt}]
        return _job(request, _call(jobs.chat_from_fields, _with_chat_logprobs(fields, request), caller))
    if request.system:
        raise UnsupportedParameterError(
            "'system' needs the model's chat template, which it lacks or 'raw' leaves out. Put it into the prompt.",
            param="system",
        )
    fields.setdefault("max_tokens", MAX_COUNT)  # up to the end of the context, not to a completion's default
    logprobs = {"logprobs": request.top_logprobs or 0} if request.logprobs else {}
    return _job(request, _call(jobs.completion_from_fields, fields | {"prompt": request.prompt} | logprobs, caller))


def find_model(name: str, adapters: ServedAdapters) -> str:
    """The name that the model is served under. Raises ModelNotFoundError."""
    for known in (name, untagged(name)):
        if adapters.resolve(known) is not None:
            return known
    raise adapters.unknown(name)


def _parse(kind: type[RequestT], body: bytes, bounds: RequestBounds) -> RequestT:
    request = validate(kind, read_fields(body, bounds, kind.model_fields, _LONG_FIELDS), bounds)
    if isinstance(request.keep_alive, str) and len(request.keep_alive) > _MAX_KEEP_ALIVE_CHARS:
        raise invalid("keep_alive", request.keep_alive, 'Give seconds, or a duration such as "5m".')
    return request


def _call(make: Any, fields: Mapping[str, Any], caller: Caller) -> Job:
    try:
        job: Job = make(fields, caller)
    except InvalidRequestError as error:
        raise renamed(error, _THEIR_NAMES) from error
    return job


def _job(request: OllamaRequest, job: Job) -> OllamaJob:
    return OllamaJob(job, request.model, request.stream is not False)


def _load(request: OllamaRequest) -> OllamaJob:
    reason = "unload" if request.keep_alive in (0, "0", "0s") and request.keep_alive is not False else "load"
    return OllamaJob(None, request.model, request.stream is not False, reason)


def _refuse_unsupported(request: OllamaGenerateRequest) -> None:
    remedies = {
        "suffix": "Leave it out: the models here do not fill in the middle of a text.",
        "template": "Use the model's own, or send 'raw': true and a prompt that is rendered already.",
        "images": "Send text only.",
        "context": "Send the conversation so far to /api/chat instead.",
    }
    for name, remedy in remedies.items():
        value = getattr(request, name)
        if value:
            raise UnsupportedParameterError(f"'{name}' is not supported (given: {shown(value)}). {remedy}", param=name)


def _common_fields(request: OllamaRequest) -> Fields:
    fields: Fields = {"stream": request.stream is not False}
    fields |= _sampling(request.options or {})
    fields |= dict.fromkeys(request.model_extra or {})  # logged as unknown
    fields |= _thinking(request.think)
    if request.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif isinstance(request.format, dict):
        named = {"name": "answer", "schema": request.format}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    elif request.format:
        raise invalid("format", request.format, 'Give "json", or a JSON schema.')
    return fields


def _with_chat_logprobs(fields: Fields, request: OllamaRequest) -> Fields:
    return fields | {"logprobs": True, "top_logprobs": request.top_logprobs or 0} if request.logprobs else fields


def _sampling(options: Mapping[str, Any]) -> Fields:
    fields: Fields = {}
    for name, value in options.items():
        where = join("options", name)
        if value is None or name in RUNNER_OPTIONS:
            continue
        if name in _UNSUPPORTED_OPTIONS:
            if value != _UNSUPPORTED_OPTIONS[name]:
                raise UnsupportedParameterError(
                    f"'{where}' is not supported (given: {shown(value)}). Leave it out.", param=where
                )
        elif name == "num_predict":
            if not isinstance(value, int) or isinstance(value, bool):
                raise invalid(where, value, "Give the most tokens of the answer, or -1 for no limit.")
            if value > 0:
                fields["max_tokens"] = value
        elif name == "seed" and value == -1:
            continue  # random
        elif name in _OPTIONS:
            fields[_OPTIONS[name]] = value
        else:
            fields[where] = None  # logged as unknown
    return fields


def _thinking(think: bool | str | None) -> Fields:
    if think is None:
        return {}
    if isinstance(think, bool):
        return {"chat_template_kwargs": {"enable_thinking": think}}
    if think not in _EFFORTS:
        raise invalid("think", think, 'Give true, false, "low", "medium", "high" or "max".')
    return {"reasoning_effort": think}


# ---- messages ---------------------------------------------------------------------------------------------------


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[Fields]:
    """The messages of a chat request. Raises InvalidRequestError."""
    made = _Messages()
    return [made.translate(message, f"messages.{at}") for at, message in enumerate(messages)]


@dataclass(frozen=True)
class _OpenCall:
    call_id: str
    name: str
    has_own_id: bool
    """Whether the client gave the id: some leave it out, and name one of their own in the result."""

    def fits(self, given_id: str | None, name: str | None) -> bool:
        same_id = not given_id or not self.has_own_id or given_id == self.call_id
        return same_id and (not name or name == self.name)


@dataclass
class _Messages:
    _num_calls: int = 0
    _open: list[_OpenCall] = field(default_factory=list)
    """The calls without a result."""

    def translate(self, message: Mapping[str, Any], where: str) -> Fields:
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise invalid(f"{where}.role", role, 'Give "system", "user", "assistant" or "tool".')
        if message.get("images"):
            raise UnsupportedParameterError(
                f"'{where}.images' is not supported by this model. Send text only.", param=f"{where}.images"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise invalid(f"{where}.content", content, "Give a string.")
        out: Fields = {"role": role, "content": content or ""}
        if role == "tool":
            out["tool_call_id"] = self._answered(message, where)
        if role == "assistant":
            thinking = message.get("thinking")
            if thinking:
                if not isinstance(thinking, str):
                    raise invalid(f"{where}.thinking", thinking, "Give a string.")
                out["reasoning_content"] = thinking
            calls = message.get("tool_calls") or []
            if not isinstance(calls, list):
                raise invalid(f"{where}.tool_calls", calls, "Give an array of calls.")
            if calls:
                out["tool_calls"] = [self._call(call, f"{where}.tool_calls.{at}") for at, call in enumerate(calls)]
        return out

    def _call(self, call: Any, where: str) -> Fields:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict | None):
            raise invalid(where, call, 'A call is {"function": {"name": "...", "arguments": {...}}}.')
        given = call.get("id")
        has_own_id = isinstance(given, str) and given != ""
        call_id = str(given) if has_own_id else f"call_{self._num_calls}"
        self._num_calls += 1
        self._open.append(_OpenCall(call_id, name, has_own_id))
        return {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": encode_json(arguments or {}).decode()},
        }

    def _answered(self, message: Mapping[str, Any], where: str) -> str:
        """The id of the call that a result is for: the one that it names, else the first without a result."""
        given, name = message.get("tool_call_id"), message.get("tool_name", message.get("name"))
        for key, value in (("tool_call_id", given), ("tool_name", name)):
            if value is not None and not isinstance(value, str):
                raise invalid(f"{where}.{key}", value, "Give a string.")
        fitting = [call for call in self._open if call.fits(given, name)]
        if given:
            fitting.sort(key=lambda call: call.call_id != given)
        if not fitting and not given:
            fitting = self._open[:1]
        if not fitting:
            raise InvalidRequestError(
                f"Invalid value for '{where}': it is the result of no call. Send the message of the assistant with its "
                "'tool_calls' before it.",
                param=where,
            )
        self._open.remove(fitting[0])
        return fitting[0].call_id
