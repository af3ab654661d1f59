"""Anthropic's Messages API: `model` and `stream` in the request, and named events up to `message_stop`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fastserve.errors import InvalidAnswerError
from fastserve.gateway.answers import decode_event
from fastserve.gateway.apis import SERVER_SENT_EVENTS, EventKind
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.peek import peek
from fastserve.serving.error_shapes import ANTHROPIC_ERRORS, OVERLOADED_STATUS


class _Error(msgspec.Struct):
    type: str
    message: str


class _Event(msgspec.Struct):
    type: str
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


class AnthropicApi:
    media_type = SERVER_SENT_EVENTS
    event_start = b"data: {"
    end_of_errors = b""
    plain_errors = False
    error_statuses: Mapping[str, int] = {
        "invalid_request_error": 400,
        "rate_limit_error": 429,
        "timeout_error": 504,
        "overloaded_error": OVERLOADED_STATUS,
    }

    async def read_target(self, body: bytes, dispatcher: Dispatcher, *, streams: bool | None) -> tuple[str, bool]:
        model, stream = peek(body)
        return model, stream if streams is None else streams

    def read_event(self, data: bytes) -> EventKind:
        event = decode_event(_decode, data, "Anthropic")
        if event.type == "error":
            if event.error is None:
                raise InvalidAnswerError("An error event of the worker's stream has no error.")
            return "error"
        return "last" if event.type == "message_stop" else "data"

    def error_body(self, data: bytes) -> bytes:
        return data

    def failure(self, error: Any) -> bytes:
        return ANTHROPIC_ERRORS.event(error)


ANTHROPIC = AnthropicApi()
