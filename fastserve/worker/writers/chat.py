"""The answer of /v1/chat/completions: one chunk for each part, or one message.

`CHAT_FIELDS` maps each type of part to the fields that it adds to `delta` in a stream. The message of a whole answer is
made of the same deltas, merged as OpenAI's clients merge them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastserve.errors import FastserveError
from fastserve.openai.answers import KEEP_ALIVE, ChunkStream, DecodedToken, Usage, encode_json
from fastserve.text.parts import Part, ReasoningPart, TextPart, ToolCallPart
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.prompts import logprobs_by_id
from fastserve.worker.results import ChoiceResult, JobResult, weight_versions_of

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


CHAT_FIELDS: Mapping[type[Part], Callable[[Any], Fields]] = {
    TextPart: _text_fields,
    ReasoningPart: _reasoning_fields,
    ToolCallPart: _tool_call_fields,
}
_ROLE: Fields = {"role": "assistant", "content": ""}
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
        self._fields = fields
        self._begun: set[int] = set()
        head = self._head("chat.completion.chunk")
        self._chunks = ChunkStream(head, "delta", include_usage=job.answer.include_usage)

    def _head(self, kind: str) -> Fields:
        return {
            "id": f"chatcmpl-{self._job.caller.request_id}",
            "object": kind,
            "created": self._created,
            "model": self._job.answer.model,
            "system_fingerprint": self._job.answer.fingerprint,
        }

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        return b"".join(map(self._write_delta, deltas))

    def _write_delta(self, delta: ChoiceDelta) -> bytes:
        index, chunk = delta.choice, self._chunks.chunk
        pieces = [self._fields[type(part)](part) for part in delta.parts]
        # Tokens without a part yet also get a chunk: it shows the client that the answer goes on.
        if not pieces and (delta.finish_reason is None or delta.tokens):
            pieces = [_NO_CONTENT]
        tokens = delta.tokens
        out = b""
        if index not in self._begun:
            self._begun.add(index)
            out = chunk(index, encode_json(_ROLE))
        for piece in pieces:
            out += chunk(index, encode_json(piece), encode_json(chat_logprobs(tokens)) if tokens else b"null")
            tokens = None
        if delta.finish_reason is not None:
            out += chunk(
                index, b"{}", finish_reason=encode_json(delta.finish_reason), weight_versions=delta.weight_versions
            )
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
        if num_top is not None:  # vLLM's field, beside the choices
            body["prompt_logprobs"] = logprobs_by_id(self._tokenizer, choices[0].prompt_logprobs or [], num_top)
        return encode_json(body)

    def _choice(self, choice: ChoiceResult) -> Fields:
        fields = {
            "index": choice.index,
            "message": fold_deltas(self._fields[type(part)](part) for part in choice.parts),
            "logprobs": None if choice.tokens is None else chat_logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }
        return fields | weight_versions_of(choice)


def fold_deltas(deltas: Iterable[Fields]) -> Fields:
    """Merge the deltas of a stream into a message, as OpenAI's clients do."""
    message: Fields = {**_ROLE, "refusal": None}
    for delta in deltas:
        _merge(message, delta)
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


def chat_logprobs(tokens: Sequence[DecodedToken]) -> Fields:
    return {
        "content": [
            {
                **_token(token.data, token.logprob),
                "top_logprobs": [_token(data, logprob) for data, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _token(data: bytes, logprob: float | None) -> Fields:
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
