"""The shapes of error answers: OpenAI's, and on the routes of other APIs theirs.

All shapes can be read by one rule (`fastserve/gateway/answers.py`): `error` is an object with OpenAI's fields, or a
string beside its `code`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.types import Scope

from fastserve.errors import FastserveError, UnsupportedParameterError
from fastserve.serving.request_ids import read_request_id

OVERLOADED_STATUS = 529
"""Anthropic's status for a service that cannot take a request now."""
_ANTHROPIC_TYPES_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    OVERLOADED_STATUS: "overloaded_error",
}
_ANTHROPIC_TYPES = {
    "invalid_request_error": "invalid_request_error",
    "overloaded_error": "overloaded_error",
    "service_unavailable_error": "overloaded_error",
    "timeout_error": "timeout_error",
}
"""Anthropic's types by OpenAI's, for errors in a stream."""
_ANTHROPIC_DETAILS_BY_REFUSED_FIELD: Mapping[str | None, Mapping[str, Any]] = {
    "thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
}
"""`error.details`, by which Anthropic's clients know that they must send the request without the field."""


class ErrorShape(Protocol):
    stream_type: bytes
    """Media type of the streams that `last_event` ends."""

    def status(self, error: FastserveError) -> int: ...

    def body(self, error: FastserveError, request_id: str) -> dict[str, Any]: ...

    def last_event(self, error: FastserveError) -> bytes:
        """The last bytes of a stream that fails after its first byte."""
        ...


class OpenAIErrors:
    stream_type = b"text/event-stream"

    def status(self, error: FastserveError) -> int:
        return error.status

    def body(self, error: FastserveError, request_id: str) -> dict[str, Any]:
        return error.body()

    def last_event(self, error: FastserveError) -> bytes:
        return error.events()


class AnthropicErrors:
    """`{"type": "error", "error": {"type", "message"}, "request_id"}`, with OpenAI's `param` and `code` in `error`."""

    stream_type = b"text/event-stream"

    def status(self, error: FastserveError) -> int:
        return OVERLOADED_STATUS if error.status == 503 else error.status

    def body(self, error: FastserveError, request_id: str) -> dict[str, Any]:
        by_status = "invalid_request_error" if error.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES_BY_STATUS.get(error.status, by_status)
        described = error.body()["error"] | {"type": kind}
        details = _ANTHROPIC_DETAILS_BY_REFUSED_FIELD.get(described["param"])
        if details is not None and described["code"] == UnsupportedParameterError.code:
            described["details"] = details
        return {"type": "error", "error": described, "request_id": request_id}

    def last_event(self, error: FastserveError) -> bytes:
        return self.event(error.body()["error"])

    def event(self, error: Mapping[str, Any]) -> bytes:
        """The event of an error object, OpenAI's or Anthropic's."""
        kind = str(error.get("type"))
        if kind not in _ANTHROPIC_TYPES_BY_STATUS.values():
            kind = _ANTHROPIC_TYPES.get(kind, "api_error")
        return b"event: error\ndata: " + _encode({"type": "error", "error": {**error, "type": kind}}) + b"\n\n"


class OllamaErrors:
    """`{"error": message}`, with OpenAI's `code` beside it, and in a stream the status that it would have had."""

    stream_type = b"application/x-ndjson"

    def status(self, error: FastserveError) -> int:
        return error.status

    def body(self, error: FastserveError, request_id: str) -> dict[str, Any]:
        described = error.body()["error"]
        return {"error": described["message"], "code": described["code"]}

    def last_event(self, error: FastserveError) -> bytes:
        return self.line(error.body()["error"] | {"status": error.status})

    def line(self, error: Mapping[str, Any]) -> bytes:
        """The line of an error object."""
        fields = {"error": error["message"], "code": error.get("code"), "status": error.get("status", 500)}
        return _encode(fields) + b"\n"


OPENAI_ERRORS, ANTHROPIC_ERRORS, OLLAMA_ERRORS = OpenAIErrors(), AnthropicErrors(), OllamaErrors()


def is_anthropic(scope: Scope) -> bool:
    """Whether a client of Anthropic's API lists the models, on the route that it shares with OpenAI's."""
    return any(name == b"anthropic-version" for name, _ in scope["headers"])


def shape_of(scope: Scope) -> ErrorShape:
    """The shape of errors on the route of a request, also of routes that do not exist."""
    path: str = scope["path"]
    if path.startswith("/v1/messages") or (path.startswith("/v1/models") and is_anthropic(scope)):
        return ANTHROPIC_ERRORS
    if path.startswith("/api/") and not path.startswith("/api/v1/"):
        return OLLAMA_ERRORS
    return OPENAI_ERRORS


def request_id_of(scope: Scope) -> str:
    """The id that the service gave the request, else the client's."""
    named: str | None = scope.get("state", {}).get("request_id")
    return read_request_id(scope["headers"]) if named is None else named


def _encode(payload: Any) -> bytes:
    return json.dumps(payload, ensure_ascii=False).encode()
