"""Workers' answers that are not streamed: read within bounds, and checked before the client gets any of them.

A worker's address may lead to a proxy's error page or another kind of server, and workers may have defects. So an
answer is passed on only if it is JSON that OpenAI's clients can read; otherwise InvalidAnswerError is raised.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import aiohttp
import msgspec

from fastserve.errors import InvalidAnswerError, PermissionDeniedError, ShortageError
from fastserve.gateway.body import AnswerBody
from fastserve.observability.text import printable
from fastserve.openai.routes import ContentsKind
from fastserve.serving.error_shapes import OVERLOADED_STATUS

MAX_ERROR_BYTES = 2**18
"""Longest error answer of a worker. An error repeats a part of the request at most."""
SHOWN_CHARS = 80
NO_SUCH_ROUTE = ("unknown_route", "unsupported_route", "wrong_method")
"""Error codes of our own services for a missing route, as when a controller was registered as a worker."""
DIGITS = re.compile(r"[0-9]{1,6}")

EventT = TypeVar("EventT")
Kind = Literal["success", "foreign", "refusal", "failure", "client error"]


class _Object(msgspec.Struct):
    """A JSON object with any content."""


class _Choice(msgspec.Struct):
    """Fields that SDKs read; all are optional."""

    index: int = 0
    message: _Object | None = None
    delta: _Object | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str
    type: str | None = None
    code: str | int | None = None
    status: int | None = None
    """Status of a plain error in a stream, had it come as an answer of its own."""


class Body(msgspec.Struct):
    """An answer, or an event of a stream: one of the two fields is set. On some routes the first has another name than
    `choices`, and another type.
    """

    choices: list[_Choice] | None = None
    error: _Error | None = None


class _PlainError(msgspec.Struct):
    """An error that is a string, with its code and status beside it."""

    error: str | None = None
    code: str | None = None
    status: int | None = None


_decode_body = msgspec.json.Decoder(Body).decode
_decode_plain_error = msgspec.json.Decoder(_PlainError).decode
_decode_any = msgspec.json.Decoder().decode


@dataclass(frozen=True)
class Contents:
    """The field that every answer has. With `plain_errors`, errors are strings."""

    name: str = "choices"
    kind: ContentsKind = "objects"
    plain_errors: bool = False


CHOICES = Contents()
_TYPES: Mapping[ContentsKind, Any] = {
    "objects": list[_Object],
    "texts": list[str],
    "list": list[_Object],
    "object": _Object,
    "text": str,
    "count": int,
    "vector": list[float],
    "vectors": list[list[float]],
}


@dataclass(frozen=True)
class Answer:
    """A worker's answer that is not streamed. It is kept until the relay decides whether to pass it on or to retry."""

    status: int
    body: bytes
    retry_after: str | None = None
    error_code: str | int | None = None

    @property
    def kind(self) -> Kind:
        """Classify the answer for the relay.

        refusal: this worker cannot take the request now, or does not serve its model. failure: the worker has an error.
        foreign: it has no such route, like FastChat's workers. client error: the request is wrong.
        """
        if self.status == 200:
            return "success"
        if self.status in (404, 405) and (self.error_code in NO_SUCH_ROUTE or _is_foreign(self.body)):
            return "foreign"
        # The route and the model are known to exist, so a 404 is not the client's mistake.
        if self.status in (404, 408, 429, 503, 504, OVERLOADED_STATUS) or self.error_code == "model_not_found":
            return "refusal"
        return "failure" if self.status >= 500 else "client error"

    def error(self) -> Any:
        """The error object of an error answer."""
        body = _decode_any(self.body)
        error = body["error"]
        return {"message": error, "type": None, "code": body.get("code")} if isinstance(error, str) else error

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self.body)).encode())]
        if self.status in (429, 503, 504, OVERLOADED_STATUS):
            headers.append((b"retry-after", (self.retry_after or "1").encode()))
        return headers


class ByteBudget:
    """Bounds the memory that answers being read take together."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes

    def take(self, num_bytes: int) -> None:
        """Raises ShortageError, and takes nothing, if fewer bytes are left."""
        if num_bytes > self._left:
            raise ShortageError(
                "The answers of the workers fill this server's memory. Try again in a moment.",
                code="server_out_of_resources",
            )
        self._left -= num_bytes

    def give(self, num_bytes: int) -> None:
        self._left += num_bytes


async def read_answer(
    response: aiohttp.ClientResponse, body: AnswerBody, max_bytes: int, budget: ByteBudget, contents: Contents = CHOICES
) -> Answer:
    """Read and check an answer with these `contents`. Raises InvalidAnswerError, ShortageError, and
    aiohttp's errors for a lost connection.

    The budget is charged only while the answer is read.
    """
    check_headers(response.headers, "application/json")
    if response.status != 200:
        if not 400 <= response.status < 600:
            raise InvalidAnswerError(f"The worker answered with status {response.status}.")
        max_bytes = min(max_bytes, MAX_ERROR_BYTES)
    length = response.headers.get("content-length", "")
    if DIGITS.fullmatch(length) and int(length) > max_bytes:
        raise too_long(max_bytes)
    pieces: list[bytes] = []
    size = 0
    try:
        while piece := await body.read():
            budget.take(len(piece))
            size += len(piece)
            pieces.append(piece)
            if size > max_bytes:
                raise too_long(max_bytes)
            if len(pieces) == 1 and piece.strip() and not piece.lstrip().startswith(b"{"):
                raise InvalidAnswerError("The worker's answer is not valid JSON.")
        content = b"".join(pieces)
    finally:
        budget.give(size)
    return check_answer(response.status, content, response.headers.get("retry-after"), contents)


def check_headers(headers: Mapping[str, str], content_type: str) -> None:
    """Raises InvalidAnswerError for another content type, or for a content encoding (none was requested)."""
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() not in ("identity", ""):
        raise InvalidAnswerError(f"The worker's answer has content-encoding {printable(encoding, SHOWN_CHARS)}.")
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != content_type:
        shown = printable(given, SHOWN_CHARS) or "none"
        raise InvalidAnswerError(f"The worker's answer has the wrong type of content: {shown}, not {content_type}.")


def check_answer(status: int, body: bytes, retry_after: str | None, contents: Contents = CHOICES) -> Answer:
    """Raises InvalidAnswerError for a body that does not fit the status."""
    if status in (404, 405) and _is_foreign(body):
        return Answer(status, body)
    parsed = parse_body(body, contents)
    if status == 200:
        if parsed.choices is None or (contents.kind in ("objects", "texts") and not parsed.choices):
            raise InvalidAnswerError(f"The worker's answer has no {contents.name}.")
        return Answer(status, body)
    if parsed.error is None:
        raise InvalidAnswerError(f"The worker answered with status {status} and no error object.")
    # A 403 with this code is for the client: its key lacks a permission.
    is_for_client = status == 403 and parsed.error.code == PermissionDeniedError.code
    if status in (401, 403, 407, 421) and not is_for_client:
        raise InvalidAnswerError(f"The worker did not accept this API server (status {status}).")
    if retry_after is not None and not DIGITS.fullmatch(retry_after):
        retry_after = None
    return Answer(status, body, retry_after, parsed.error.code)


def parse_body(data: bytes, contents: Contents = CHOICES) -> Body:
    """Raises InvalidAnswerError unless the data is UTF-8 and a JSON object with OpenAI's `choices` (or other
    `contents`) or `error`, whose types are right.

    Takes time and memory in proportion to the size.
    """
    try:
        if not data.isascii():
            data.decode()
        return _decoder_of(contents)(data)
    except UnicodeDecodeError as error:
        raise InvalidAnswerError("The worker's answer is not UTF-8.") from error
    except msgspec.ValidationError as error:
        raise InvalidAnswerError("The worker's answer has another shape than OpenAI's.") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidAnswerError("The worker's answer is not valid JSON.") from error


@functools.cache
def _decoder_of(contents: Contents) -> Callable[[bytes], Body]:
    if contents == CHOICES:
        return _decode_body
    error_type = msgspec.Raw if contents.plain_errors else _Error | None
    fields = [("choices", _TYPES[contents.kind] | None, None), ("error", error_type, None)]
    kind = cast(type[Body], msgspec.defstruct("Body", fields, rename={"choices": contents.name}))
    decode = msgspec.json.Decoder(kind).decode
    if not contents.plain_errors:
        return decode

    def decode_with_plain_error(data: bytes) -> Body:
        body, found = decode(data), _decode_plain_error(data)
        body.error = None if found.error is None else _Error(found.error, code=found.code, status=found.status)
        return body

    return decode_with_plain_error


def decode_event(decode: Callable[[bytes], EventT], data: bytes, api: str) -> EventT:
    """Decode an event of the stream of an API. Raises InvalidAnswerError for another shape."""
    try:
        return decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAnswerError(f"An event of the worker's stream has another shape than {api}'s.") from error


def error_alone(data: bytes) -> bytes:
    """The error of an event as the body of an answer; other fields of the event are dropped."""
    found = _decode_any(data)
    return data if found.keys() == {"error"} else msgspec.json.encode({"error": found["error"]})


def too_long(max_bytes: int) -> InvalidAnswerError:
    return InvalidAnswerError(f"The worker's answer is longer than {max_bytes} bytes.")


def _is_foreign(body: bytes) -> bool:
    """Whether an error has FastAPI's own format: the server has no such route."""
    try:
        parsed = _decode_any(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(parsed, dict) and isinstance(parsed.get("detail"), str) and "error" not in parsed
