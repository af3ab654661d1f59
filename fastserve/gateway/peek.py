"""Reads from a request body the fields that are needed to choose a worker."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from fastserve.errors import InvalidRequestError
from fastserve.observability.text import printable
from fastserve.openai.body import explain_json

PeekT = TypeVar("PeekT")


class Peek(msgspec.Struct):
    """Fields needed for routing; the worker validates all others."""

    model: str | None = None
    stream: bool | None = None


class _SLoraPeek(msgspec.Struct):
    model: str | None = None
    lora_dir: str | None = None


class _Item(msgspec.Struct):
    model: str | None = None


class _TokensPeek(msgspec.Struct):
    model: str | None = None
    prompts: list[_Item] | None = None


class _Conversation(msgspec.Struct):
    id: str


class ResponsePeek(msgspec.Struct):
    """Fields of a Responses request that refer to the store."""

    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    conversation: str | _Conversation | None = None
    input: msgspec.Raw = msgspec.Raw()

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, _Conversation) else self.conversation


class _OllamaPeek(msgspec.Struct):
    model: str | None = None
    name: str | None = None
    stream: bool | None = None


_EXPECTED = {
    "store": "true or false",
    "background": "true or false",
    "previous_response_id": "the id of a response",
    "conversation": 'the id of a conversation, or {"id": ...}',
    "name": "a string",
    "model": "a string",
    "stream": "true or false",
    "prompts": "an array of objects with model and prompt",
    "lora_dir": "a string as in --lora-dirs, or the name of an adapter",
}
_FIELD = re.compile(r"`\$\.(\w+)")
_decoder = msgspec.json.Decoder(Peek)
_tokens_decoder = msgspec.json.Decoder(_TokensPeek)
_ollama_decoder = msgspec.json.Decoder(_OllamaPeek)
_slora_decoder = msgspec.json.Decoder(_SLoraPeek)
_response_decoder = msgspec.json.Decoder(ResponsePeek)
_raw_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MAX_SHOWN_BYTES = 80


def peek(body: bytes) -> tuple[str, bool]:
    """Returns the request's `model` and `stream`. Raises InvalidRequestError."""
    seen = _decode(_decoder, body)
    if not seen.model:
        raise _no_model()
    return seen.model, bool(seen.stream)


def peek_ollama(body: bytes) -> tuple[str, bool]:
    """Returns `model` (or `name`) and `stream` of a request of Ollama's. Raises InvalidRequestError."""
    seen = _decode(_ollama_decoder, body)
    model = seen.model or seen.name
    if not model:
        raise _no_model()
    return model, seen.stream is not False


def _no_model() -> InvalidRequestError:
    return InvalidRequestError("Missing required field 'model'.", param="model", code="missing_required_parameter")


def peek_slora(body: bytes) -> tuple[str | None, str | None]:
    """Returns `model` and `lora_dir` of a request of S-LoRA's. Raises InvalidRequestError."""
    seen = _decode(_slora_decoder, body)
    return seen.model, seen.lora_dir


def peek_tokens(body: bytes) -> list[str | None]:
    """Returns the models that a request about tokens names, one for each of its prompts. Raises InvalidRequestError."""
    seen = _decode(_tokens_decoder, body)
    return [seen.model] if seen.prompts is None else [item.model for item in seen.prompts]


def peek_response(body: bytes) -> ResponsePeek:
    """Raises InvalidRequestError."""
    return _decode(_response_decoder, body)


def _decode(decoder: msgspec.json.Decoder[PeekT], body: bytes) -> PeekT:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(body, error) from error


def _explain(body: bytes, error: Exception) -> InvalidRequestError:
    """The error for a body that msgspec rejected, without msgspec's wording."""
    if isinstance(error, RecursionError):
        return InvalidRequestError("The request body is not valid JSON: it is nested too deep.")
    if not isinstance(error, msgspec.ValidationError):
        return explain_json(body, error, "")
    try:
        fields = _raw_decoder.decode(body)
    except msgspec.ValidationError:
        return InvalidRequestError("The request body must be a JSON object.")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as other:  # behind the field that is wrong
        return _explain(body, other)
    found = _FIELD.search(str(error))
    name = "model" if found is None else found[1]
    value = bytes(fields[name])[: _MAX_SHOWN_BYTES + 1].decode(errors="replace")
    return InvalidRequestError(
        f"Invalid value for '{name}': {printable(value, _MAX_SHOWN_BYTES)}. Give {_EXPECTED[name]}.", param=name
    )
