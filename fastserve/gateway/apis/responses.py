"""OpenAI's Responses API: typed events with sequence numbers, of which one with the final response is the last.

The API server follows the events of a stream, to store the response at its end, and to end a stream that breaks with an
event that continues the others. So there is one object for each request.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fastserve.errors import InvalidAnswerError
from fastserve.gateway.apis import EventKind
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.peek import peek
from fastserve.openai.responses.answer import TERMINAL_EVENTS, error_event, event


class _Event(msgspec.Struct):
    type: str
    sequence_number: int
    response: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Event).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode


class ResponsesApi:
    event_start = b"data: {"
    end_of_errors = b""

    def __init__(self) -> None:
        self._num_events = 0
        self.response: bytes = b""
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
        self.is_ended = found.type in TERMINAL_EVENTS
        return "last" if self.is_ended else "data"

    def failure(self, error: Any) -> bytes:
        if not self.response:
            return error_event(error, self._num_events)
        self.is_ended = True
        failed = _decode_object(self.response) | {
            "status": "failed",
            "error": {"code": "server_error", "message": error["message"]},
        }
        self.response = msgspec.json.encode(failed)
        return event("response.failed", self._num_events, {"response": msgspec.Raw(self.response)})
