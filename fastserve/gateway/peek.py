"""Reads from a request body the fields that are needed to choose a worker."""

from __future__ import annotations

import msgspec

from fastserve.errors import InvalidRequestError
from fastserve.observability.text import printable
from fastserve.openai.body import explain_json


class Peek(msgspec.Struct):
    """Fields needed for routing; the worker validates all others."""

    model: str | None = None
    stream: bool | None = None


_decoder = msgspec.json.Decoder(Peek)
_raw_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MAX_SHOWN_BYTES = 80


def peek(body: bytes) -> tuple[str, bool]:
    """Returns the request's `model` and `stream`. Raises InvalidRequestError."""
    try:
        seen = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(body, error) from error
    if not seen.model:
        raise InvalidRequestError("Missing required field 'model'.", param="model", code="missing_required_parameter")
    return seen.model, bool(seen.stream)


def _explain(body: bytes, error: Exception) -> InvalidRequestError:
    """The error for a body that msgspec rejected, without msgspec's wording."""
    if isinstance(error, RecursionError):
        return InvalidRequestError("The request body is not valid JSON: it is nested too deep.")
    if not isinstance(error, msgspec.ValidationError):
        return explain_json(body, error, "")
    try:
        fields = _raw_decoder.decode(body)
    except msgspec.ValidationError:
        return InvalidRequestError("The request body must be a JSON object.")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as other:  # behind the field that is wrong
        return _explain(body, other)
    name, expected = ("model", "a string") if "`$.model`" in str(error) else ("stream", "true or false")
    value = bytes(fields[name])[: _MAX_SHOWN_BYTES + 1].decode(errors="replace")
    return InvalidRequestError(
        f"Invalid value for '{name}': {printable(value, _MAX_SHOWN_BYTES)}. Give {expected}.", param=name
    )
