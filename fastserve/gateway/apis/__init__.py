"""An API as the relay knows it, one file each: where a request names its model, and how a stream goes and ends.

The bytes of requests and answers are passed on unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from fastserve.gateway.dispatch import Dispatcher

EventKind = Literal["data", "last", "error", "end"]
"""data: a part of the answer; last: the part that ends it; error: the answer has failed; end: a mark without data."""
SERVER_SENT_EVENTS = "text/event-stream"
JSON_LINES = "application/x-ndjson"


class Api(Protocol):
    media_type: str
    """Media type of streams: SERVER_SENT_EVENTS, whose events may have names, or JSON_LINES, whose events are lines."""
    event_start: bytes
    """How server-sent events without a name begin, up to the brace of their JSON."""
    end_of_errors: bytes
    """Bytes after the error event of a stream, which end it."""
    plain_errors: bool
    """An error is a string with its `code` beside it, and in a stream its `status`, not an object."""
    error_statuses: Mapping[str, int]
    """Status of an error event by its type, had it come as an answer of its own; others are 500."""

    async def read_target(self, body: bytes, dispatcher: Dispatcher, *, streams: bool | None) -> tuple[str, bool]:
        """The model or adapter that a request is for, as `Dispatcher.acquire` takes it, and whether it wants a stream.
        `streams`: whether all requests of the route do; None: each says so.

        Raises InvalidRequestError, ModelNotFoundError and NoWorkerError.
        """
        ...

    def read_event(self, data: bytes) -> EventKind:
        """Check the data of an event. Raises InvalidAnswerError if the API's clients cannot read it."""
        ...

    def error_body(self, data: bytes) -> bytes:
        """The data of an error event as the body of an error answer."""
        ...

    def failure(self, error: Any) -> bytes:
        """The last event of a stream that fails, and the stream's end. `error`: OpenAI's error object, or that of an
        error answer.
        """
        ...
