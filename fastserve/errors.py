"""The exception tree of fastserve: each class sets the HTTP status and OpenAI error fields of its case.

    FastserveError
      StartupError                  wrong flag, missing model, port in use: ends the process at start, with the reason
      RequestError                  the client can fix it (4xx)
        InvalidRequestError           400  a field is missing, malformed or out of range
          UnsupportedParameterError   400  a known field that cannot be honoured yet
          UnsupportedCapabilityError  400  the model is served, but not for this route
          ContextLengthError          400  prompt and answer do not fit the context
        AuthenticationError           401
        PermissionDeniedError         403  the key is right, but not for this
        ModelNotFoundError            404
        EntryNotFoundError            404  a response, conversation, item, file or batch that is not stored
        WeightNotFoundError           404
        WeightGroupNotFoundError      404  no group of a trainer has this name
        ConflictError                 409  the name belongs to somebody else
        RequestTimeoutError           408  headers or body did not come in time
        BodyTooLargeError             413
        UnsupportedEncodingError      415  a compressed body
        UnsupportedMediaTypeError     415
        MisdirectedRequestError       421  the Host header names another server
        HeadersTooLargeError          431
        OverloadedError               429  the queue is full; carries Retry-After
      ServiceError                  the client cannot fix it (5xx); another worker may succeed
        ShuttingDownError             503  the drain has ended, or the request had not begun when it started
        ShortageError                 503  this process is out of connections, memory or room for bodies
        NoWorkerError                 503
        WorkerLostError               503  a worker went away before or during an answer
        EngineDeadError               503
        InvalidAnswerError            502  invalid answer of a worker: no JSON, no event stream, wrong schema, too long
        LoopDetectedError             508  a request came back to an API server that had already forwarded it
        ModelLoadingError             503  carries Retry-After
        WorkerTimeoutError            504
        FirstTokenLateError           503  --enable-abort: the first token would come later than it is of use
        EngineTimeoutError            504  the engine has not answered a call in time
        WeightTransferError           502  a trainer went away, or sent something else than it announced
        WeightsIncompleteError        503  a weight update failed halfway, and a whole set of weights has not come yet
        RequestAbortedError           503  an administrator aborted the running requests
      InternalError                 500
        RequestKilledWorkersError     500  two workers died while they worked on the request; it is not tried again

`legacy_code` is FastChat's number for the same case, so clients of FastChat can read our error bodies.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_MESSAGE_CHARS = 2000
MAX_PARAM_CHARS = 200


class FastserveError(Exception):
    """Base class of all exceptions that fastserve raises on purpose."""

    status = 500
    type = "internal_error"
    code: str | None = "internal_error"
    legacy_code = 50001
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object, and FastChat's `object`, `message` and `code` next to it."""
        message = _sendable(self.message, MAX_MESSAGE_CHARS)
        param = None if self.param is None else _sendable(self.param, MAX_PARAM_CHARS)
        error = {"message": message, "type": self.type, "param": param, "code": self.code}
        return {"error": error, "object": "error", "message": message, "code": self.legacy_code}

    def events(self) -> bytes:
        """Last events of a stream that failed after its first byte: the error and [DONE]."""
        return b"data: " + json.dumps(self.body(), ensure_ascii=False).encode() + b"\n\ndata: [DONE]\n\n"

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class StartupError(FastserveError):
    """A process cannot start. The message says what is wrong and what to do."""

    exit_code = 1


class RequestError(FastserveError):
    status = 400
    type = "invalid_request_error"
    code: str | None = None
    legacy_code = 40001


class InvalidRequestError(RequestError):
    code = "invalid_value"
    legacy_code = 40302


class UnsupportedParameterError(InvalidRequestError):
    code = "unsupported_parameter"


class UnsupportedCapabilityError(InvalidRequestError):
    code = "unsupported_capability"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"
    legacy_code = 40303


class AuthenticationError(RequestError):
    status = 401
    code = "invalid_api_key"
    legacy_code = 40101


class PermissionDeniedError(RequestError):
    status = 403
    code = "permission_denied"
    legacy_code = 40101


class ModelNotFoundError(RequestError):
    status = 404
    code = "model_not_found"
    legacy_code = 40301


class EntryNotFoundError(RequestError):
    status = 404
    code = "not_found"


class WeightNotFoundError(RequestError):
    status = 404
    code = "weight_not_found"


class WeightGroupNotFoundError(RequestError):
    status = 404
    code = "group_not_found"


class ConflictError(RequestError):
    status = 409
    code = "conflict"


class BodyTooLargeError(RequestError):
    status = 413
    code = "request_too_large"


class RequestTimeoutError(RequestError):
    status = 408
    code = "request_timeout"


class UnsupportedEncodingError(RequestError):
    status = 415
    code = "unsupported_encoding"


class HeadersTooLargeError(RequestError):
    status = 431
    code = "headers_too_large"


class UnsupportedMediaTypeError(RequestError):
    status = 415
    code = "unsupported_media_type"


class MisdirectedRequestError(RequestError):
    status = 421
    code = "unknown_host"


class OverloadedError(RequestError):
    status = 429
    type = "overloaded_error"
    code = "overloaded"
    legacy_code = 42903

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServiceError(FastserveError):
    status = 503
    type = "service_unavailable_error"
    code = "service_unavailable"
    retry_after_s: float | None = 1.0

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class ShortageError(ServiceError):
    """This process is out of a resource of its own; no other service has failed."""

    code = "server_overloaded"
    retry_after_s = 1.0


class ShuttingDownError(ServiceError):
    code = "server_shutting_down"
    retry_after_s = 2.0


class NoWorkerError(ServiceError):
    code = "no_worker"
    legacy_code = 50005


class WorkerLostError(ServiceError):
    code = "worker_lost"
    legacy_code = 50001


class EngineDeadError(ServiceError):
    code = "engine_dead"
    retry_after_s = 2.0


class ModelLoadingError(ServiceError):
    code = "model_loading"


class WorkerTimeoutError(ServiceError):
    status = 504
    type = "timeout_error"
    code = "worker_timeout"
    legacy_code = 50006


class EngineTimeoutError(ServiceError):
    status = 504
    type = "timeout_error"
    code = "engine_timeout"


class FirstTokenLateError(ServiceError):
    code = "first_token_late"


class WeightTransferError(ServiceError):
    status = 502
    code = "weight_transfer_failed"
    retry_after_s = None


class WeightsIncompleteError(ServiceError):
    code = "weights_incomplete"


class RequestAbortedError(ServiceError):
    code = "request_aborted"


class InvalidAnswerError(ServiceError):
    status = 502
    code = "bad_worker_answer"


class LoopDetectedError(ServiceError):
    status = 508
    code = "loop_detected"
    retry_after_s = None


class InternalError(FastserveError):
    pass


class RequestKilledWorkersError(InternalError):
    code = "request_killed_workers"

    def headers(self) -> dict[str, str]:
        """Adds the header that keeps OpenAI's SDKs from retrying."""
        return {**super().headers(), "x-should-retry": "false"}


def _sendable(text: str, max_chars: int) -> str:
    """`text` shortened to `max_chars`, with lone surrogates escaped, as UTF-8 cannot encode them."""
    kept = text if len(text) <= max_chars else text[:max_chars] + "…"
    return kept if kept.isascii() else kept.encode(errors="backslashreplace").decode()
