"""OpenAI's API: `model` and `stream` in the request, chunks with `choices`, and `[DONE]` at the end of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fastserve.errors import InvalidAnswerError, OverloadedError, RequestError, ServiceError, WorkerTimeoutError
from fastserve.gateway.answers import error_alone, parse_body
from fastserve.gateway.apis import SERVER_SENT_EVENTS, EventKind
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.peek import peek
from fastserve.openai.answers import DONE

ERROR_STATUSES: Mapping[str, int] = {
    OverloadedError.type: OverloadedError.status,
    ServiceError.type: ServiceError.status,
    WorkerTimeoutError.type: WorkerTimeoutError.status,
    RequestError.type: RequestError.status,
}


class OpenAIApi:
    media_type = SERVER_SENT_EVENTS
    event_start = b"data: {"
    end_of_errors = DONE
    plain_errors = False
    error_statuses = ERROR_STATUSES

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

    def error_body(self, data: bytes) -> bytes:
        return error_alone(data)

    def failure(self, error: Any) -> bytes:
        return b"data: " + msgspec.json.encode({"error": error}) + b"\n\n" + DONE


OPENAI = OpenAIApi()
