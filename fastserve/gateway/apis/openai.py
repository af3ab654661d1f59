"""OpenAI's API: `model` and `stream` in the request, chunks with `choices`, and `[DONE]` at the end of a stream."""

from __future__ import annotations

from typing import Any

import msgspec

from fastserve.errors import InvalidAnswerError
from fastserve.gateway.answers import parse_body
from fastserve.gateway.apis import EventKind
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.peek import peek
from fastserve.openai.answers import DONE


class OpenAIApi:
    event_start = b"data: {"
    end_of_errors = DONE

    async def read_target(self, body: bytes, dispatcher: Dispatcher, *, streams: bool | None) -> tuple[str, bool]:
        model, stream = peek(body)
        return model, stream if streams is None else streams

    def read_event(self, data: bytes) -> EventKind:
        if data == b"[DONE]":
            return "end"
        body = parse_body(data)
        if body.error is not None:
            return "error"
        if body.choices is None:
            raise InvalidAnswerError("An event of the worker's stream has neither choices nor an error.")
        return "data"

    def failure(self, error: Any) -> bytes:
        return b"data: " + msgspec.json.encode({"error": error}) + b"\n\n" + DONE


OPENAI = OpenAIApi()
