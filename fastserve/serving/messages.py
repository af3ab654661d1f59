"""Messages of other services: parsed once, at the door, and refused with a sentence that names the field."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fastserve.errors import InvalidRequestError
from fastserve.observability.text import printable

MAX_SHOWN_CHARS = 80
MessageT = TypeVar("MessageT", bound=BaseModel)


def parse_message(kind: type[MessageT], content: bytes) -> MessageT:
    """Raises InvalidRequestError."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise invalid_message(error) from None


def invalid_message(error: ValidationError) -> InvalidRequestError:
    """The first finding as a sentence that names the field, the value and what is allowed."""
    # A message has few fields and its lists stop at the first wrong element, so there are few findings to build.
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"])) or "body"
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"The body is not valid JSON: {first['ctx']['error']}.")
    if first["type"] == "missing":
        return InvalidRequestError(f"Missing required field '{name}'.", param=name, code="missing_required_parameter")
    value = first["input"]
    # A container is not shown: writing out a large one would cost more than the whole message.
    shown = f"a {type(value).__name__}" if isinstance(value, dict | list) else printable(_text(value), MAX_SHOWN_CHARS)
    if first["type"] == "string_pattern_mismatch":
        reason = "It may not be empty or hold control characters"
    else:
        reason = first["msg"]
    return InvalidRequestError(f"Invalid value for '{name}': {shown}. {reason}.", param=name)


def _text(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "an integer of more than 64 bits"  # Python refuses to write out integers of thousands of digits
    return repr(value[: MAX_SHOWN_CHARS + 1] if isinstance(value, str) else value)
