"""The door for request bodies: read with a bound, and looked at just enough to choose a worker."""

from __future__ import annotations

import msgspec
from starlette.requests import Request

from fastserve.errors import BodyTooLargeError, InvalidRequestError

MAX_BODY_BYTES = 64 * 2**20


class Peek(msgspec.Struct):
    """What routing needs; all other fields are the worker's business."""

    model: str | None = None
    stream: bool | None = None


_decoder = msgspec.json.Decoder(Peek)


async def read_body(request: Request, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The whole body. Raises BodyTooLargeError, and starlette's ClientDisconnect when the client goes away."""
    too_large = BodyTooLargeError(f"The request body is larger than {limit_bytes} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > limit_bytes:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)


def peek(body: bytes) -> tuple[str, bool]:
    """The model that the request names, and whether it wants a stream. Raises InvalidRequestError."""
    try:
        seen = _decoder.decode(body)
    except msgspec.ValidationError as error:
        # msgspec names the place as a path, such as "- at `$.stream`".
        param = str(error).rpartition("`$.")[2].rstrip("`") if "`$." in str(error) else None
        raise InvalidRequestError(f"The request body is not valid: {error}.", param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}.", code="invalid_json") from error
    if not seen.model:
        raise InvalidRequestError("Missing required field 'model'.", param="model", code="missing_required_parameter")
    return seen.model, bool(seen.stream)
