"""The answer of /v1/chat/completions: one chunk for each part, or one message.

`CHAT_FIELDS` maps each type of part to the fields that it adds to `delta` in a stream. The message of a whole answer is
made of the same deltas, merged as OpenAI's clients merge them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastserve.errors import FastserveError
from fastserve.openai.answers import (
    KEEP_ALIVE,
    ChunkStream,
    DecodedToken,
    Usage,
    encode_json,
    token_id_name,
    token_text,
)
from fastserve.text.parts import Part, ReasoningPart, TextPart, ToolCallPart
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.prompts import logprobs_by_id
from fastserve.worker.results import ChoiceResult, JobResult, RunningUsage, extra_fields

Fields = dict[str, Any]


def _text_fields(part: TextPart) -> Fields:
    return {"content": part.text}


def _reasoning_fields(part: ReasoningPart) -> Fields:
    # vLLM's name of today, and the older one, which SGLang and llama.cpp have kept.
    return {"reasoning": part.text, "reasoning_content": part.text}


def _tool_call_fields(part: ToolCallPart) -> Fields:
    # Clients concatenate the strings of deltas, so each of id, type and name is sent once.
    call: Fields = {"index": part.index}
    if part.id:
        call |= {"id": part.id, "type": "function"}
    function = {"name": part.name} if part.name else {}
    return {"tool_calls": [call | {"function": function | {"arguments": part.arguments}}]}


def _function_call_fields(part: ToolCallPart) -> Fields:
    """The old form, which has one call at most."""
    name = {"name": part.name} if part.name else {}
    return {"function_call": name | {"arguments": part.arguments}}


CHAT_FIELDS: Mapping[type[Part], Callable[[Any], Fields]] = {
    TextPart: _text_fields,
    ReasoningPart: _reasoning_fields,
    ToolCallPart: _tool_call_fields,
}
_NO_CONTENT: Fields = {"content": ""}


class ChatWriter:
    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        job: Job,
        created: int,
        tokenizer: Tokenizer,
        fields: Mapping[type[Part], Callable[[Any], Fields]] = CHAT_FIELDS,
    ) -> None:
        self._job = job
        self._created = created
        self._tokenizer = tokenizer
        own: dict[type[Part], Callable[[Any], Fields]] = {}
        if job.answer.has_function_call:
            own[ToolCallPart] = _function_call_fields
        self._fields = {**fields, **own}
        self._begun: set[int] = set()
        options = job.answer
        self._usage = RunningUsage(job) if options.sends_continuous_usage else None
        self._chunks = ChunkStream(
            self._head("chat.completion.chunk"),
            "delta",
            include_usage=options.include_usage,
            obfuscates=options.sends_obfuscation,
        )

    def _head(self, kind: str) -> Fields:
        return {
            "id": f"chatcmpl-{self._job.caller.request_id}",
            "object": kind,
            "created": self._created,
            "model": self._job.answer.model,
            "system_fingerprint": self._job.answer.fingerprint,
            **self._job.answer.extra,
        }

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        return b"".join(map(self._write_delta, deltas))

    def _write_delta(self, delta: ChoiceDelta) -> bytes:
        index, options = delta.choice, self._job.answer
        more: Fields = {} if self._usage is None else {"usage": self._usage.count(delta).as_dict()}
        fields = extra_fields(delta, has_token_ids=options.returns_token_ids)
        pieces = [self._fields[type(part)](part) for part in delta.parts]
        # Tokens without a part yet also get a chunk: it shows the client that the answer goes on.
        if not pieces and (delta.finish_reason is None or delta.tokens):
            pieces = [_NO_CONTENT]
        tokens = delta.tokens
        out = b""
        if index not in self._begun:
            self._begun.add(index)
            role: Fields = {"role": "assistant", "content": options.echoed}
            prompt = {"prompt_token_ids": self._job.prompts[0].token_ids} if options.returns_token_ids else {}
            out = self._chunks.chunk(index, encode_json(role), more=more | prompt)
        last_fields = fields if not pieces else {name: value for name, value in fields.items() if name != "token_ids"}
        for piece in pieces:
            logprobs = encode_json(chat_logprobs(tokens, by_id=options.names_tokens_by_id)) if tokens else b"null"
            own = {"token_ids": fields.pop("token_ids")} if "token_ids" in fields else {}
            out += self._chunks.chunk(index, encode_json(piece), logprobs, more_of_choice=own, more=more)
            tokens = None
        if delta.finish_reason is not None:
            reason = encode_json(delta.finish_reason)
            out += self._chunks.chunk(index, b"{}", finish_reason=reason, more_of_choice=last_fields, more=more)
        return out

    def end(self, usage: Usage) -> bytes:
        return self._chunks.end(usage)

    def error(self, error: FastserveError) -> bytes:
        return error.events()

    def whole(self, result: JobResult) -> bytes:
        choices = result.choices
        num_top = self._job.answer.prompt_logprobs
        body = self._head("chat.completion") | {
            "choices": [self._choice(choice) for choice in choices],
            "usage": result.usage.as_dict(),
        }
        if self._job.answer.returns_token_ids:
            body["prompt_token_ids"] = self._job.prompts[0].token_ids
        if num_top is not None:  # vLLM's field, beside the choices
            body["prompt_logprobs"] = logprobs_by_id(self._tokenizer, choices[0].prompt_logprobs or [], num_top)
        return encode_json(body)

    def _choice(self, choice: ChoiceResult) -> Fields:
        options = self._job.answer
        parts = (self._fields[type(part)](part) for part in choice.parts)
        return {
            "index": choice.index,
            "message": fold_deltas(parts, options.echoed),
            "logprobs": None
            if choice.tokens is None
            else chat_logprobs(choice.tokens, by_id=options.names_tokens_by_id),
            "finish_reason": choice.finish_reason,
            **extra_fields(choice, has_token_ids=options.returns_token_ids),
        }


def fold_deltas(deltas: Iterable[Fields], content: str = "") -> Fields:
    """Merge the deltas of a stream into a message, as OpenAI's clients do. `content`: that of its first chunk."""
    message: Fields = {"role": "assistant", "content": content, "refusal": None}
    for delta in deltas:
        _merge(message, delta)
    if not message["content"] and len(message) > len(("role", "content", "refusal")):
        message["content"] = None  # calls or reasoning, and no text
    return message


def _merge(target: Fields, delta: Fields) -> None:
    """Concatenate strings, merge objects and lists (by the `index` of their items), and replace all other values."""
    for name, value in delta.items():
        known = target.get(name)
        if isinstance(value, list):
            items = target.setdefault(name, [])
            for item in value:
                if item["index"] == len(items):
                    items.append({})
                _merge(items[item["index"]], {key: field for key, field in item.items() if key != "index"})
        elif isinstance(value, dict) and isinstance(known, dict):
            _merge(known, value)
        elif isinstance(value, str) and isinstance(known, str):
            target[name] = known + value
        else:
            target[name] = value


def chat_logprobs(tokens: Sequence[DecodedToken], *, by_id: bool = False) -> Fields:
    """`by_id`: whether tokens are named by their ids instead of their texts."""

    def written(token_id: int, data: bytes, logprob: float | None) -> Fields:
        name = token_id_name(token_id) if by_id else token_text(data)
        return {"token": name, "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            {
                **written(token.token_id, token.data, token.logprob),
                "top_logprobs": [written(*entry) for entry in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }
