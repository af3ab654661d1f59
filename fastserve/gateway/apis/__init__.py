"""An API as the relay knows it, one file each: where a request names its model, and how a stream goes and ends.

The bytes of requests and answers are passed on unchanged.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from fastserve.gateway.dispatch import Dispatcher

EventKind = Literal["data", "last", "error", "end"]
"""data: a part of the answer; last: the part that ends it; error: the answer has failed; end: a mark without data."""


class Api(Protocol):
    event_start: bytes
    """How events begin, up to the brace of their JSON."""
    end_of_errors: bytes
    """Bytes after the error event of a stream, which end it."""

    async def read_target(self, body: bytes, dispatcher: Dispatcher, *, streams: bool | None) -> tuple[str, bool]:
        """The model or adapter that a request is for, as `Dispatcher.acquire` takes it, and whether it wants a stream.
        `streams`: whether all requests of the route do; None: each says so.

        Raises InvalidRequestError, ModelNotFoundError and NoWorkerError.
        """
        ...

    def read_event(self, data: bytes) -> EventKind:
        """Check the data of an event. Raises InvalidAnswerError if the API's clients cannot read it."""
        ...

    def failure(self, error: Any) -> bytes:
        """The last event of a stream that fails, with OpenAI's error object, and the stream's end."""
        ...
