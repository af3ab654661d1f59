"""Ollama's API: `model` in the request, which streams unless it says otherwise, and lines of JSON up to `done`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fastserve.errors import InvalidAnswerError
from fastserve.gateway.answers import decode_event
from fastserve.gateway.apis import JSON_LINES, EventKind
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.peek import peek_ollama
from fastserve.openai.ollama import untagged
from fastserve.serving.error_shapes import OLLAMA_ERRORS


class _Message(msgspec.Struct):
    role: str
    content: str


class _Line(msgspec.Struct):
    """Fields that clients read."""

    done: bool = False
    error: str | None = None
    message: _Message | None = None
    response: str | None = None


_decode = msgspec.json.Decoder(_Line).decode


class OllamaApi:
    media_type = JSON_LINES
    event_start = b""
    end_of_errors = b""
    plain_errors = True
    error_statuses: Mapping[str, int] = {}

    async def read_target(self, body: bytes, dispatcher: Dispatcher, *, streams: bool | None) -> tuple[str, bool]:
        model, stream = peek_ollama(body)
        known = model in dispatcher.model_names() or dispatcher.find_adapter(model) is not None
        return model if known else untagged(model), stream if streams is None else streams

    def read_event(self, data: bytes) -> EventKind:
        line = decode_event(_decode, data, "Ollama")
        if line.error is not None:
            return "error"
        if line.message is None and line.response is None:
            raise InvalidAnswerError("A line of the worker's stream has neither text nor an error.")
        return "last" if line.done else "data"

    def error_body(self, data: bytes) -> bytes:
        return data

    def failure(self, error: Any) -> bytes:
        return OLLAMA_ERRORS.line(error)


OLLAMA = OllamaApi()
