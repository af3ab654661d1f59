"""OpenAI's Responses API: typed events with sequence numbers, of which one with the final response is the last.

The API server follows the events of a stream, to store the response at its end, and to end a stream that breaks with an
event that continues the others. So there is one object for each request.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fastserve.errors import InvalidAnswerError
from fastserve.gateway.answers import error_alone
from fastserve.gateway.apis import SERVER_SENT_EVENTS, EventKind
from fastserve.gateway.apis.openai import ERROR_STATUSES
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.peek import peek
from fastserve.openai.responses.answer import TERMINAL_EVENTS, error_event, error_object, event


class _Event(msgspec.Struct):
    type: str
    sequence_number: int
    response: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Event).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode


class ResponsesApi:
    media_type = SERVER_SENT_EVENTS
    event_start = b"data: {"
    end_of_errors = b""
    plain_errors = False
    error_statuses = ERROR_STATUSES

    def __init__(self, response: bytes = b"", num_events: int = 0, *, keeps_events: bool = False) -> None:
        """`response`, `num_events`: what the client has already; `keeps_events`: whether to collect those that come."""
        self._num_events = num_events
        self._keeps_events = keeps_events
        self.events: list[bytes] = []
        """Events that have come since the list was emptied."""
        self.response = response
        """JSON of the newest response object in the stream."""
        self.is_ended = False
        """`response` is the final one."""

    async def read_target(self, body: bytes, dispatcher: Dispatcher, *, streams: bool | None) -> tuple[str, bool]:
        model, stream = peek(body)
        return model, stream if streams is None else streams

    def read_event(self, data: bytes) -> EventKind:
        try:
            found = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidAnswerError("An event of the worker's stream is no event of a response.") from error
        if found.type == "error":
            return "error"
        self._num_events = found.sequence_number + 1
        if found.response:
            self.response = bytes(found.response)
        if self._keeps_events:
            self.events.append(b"event: %b\ndata: %b\n\n" % (found.type.encode(), data))
        self.is_ended = found.type in TERMINAL_EVENTS
        return "last" if self.is_ended else "data"

    def error_body(self, data: bytes) -> bytes:
        return error_alone(data)

    def failure(self, error: Any) -> bytes:
        if not self.response:
            return error_event(error, self._num_events)
        self.is_ended = True
        failed = _decode_object(self.response) | {"status": "failed", "error": error_object(error)}
        self.response = msgspec.json.encode(failed)
        last = event("response.failed", self._num_events, {"response": msgspec.Raw(self.response)})
        if self._keeps_events:
            self.events.append(last)
        return last
