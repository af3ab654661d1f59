"""A request body, looked at just enough to choose a worker."""

from __future__ import annotations

import msgspec

from fastserve.errors import InvalidRequestError


class Peek(msgspec.Struct):
    """What routing needs; all other fields are the worker's business."""

    model: str | None = None
    stream: bool | None = None


_decoder = msgspec.json.Decoder(Peek)


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
