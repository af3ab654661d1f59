"""Parses messages of other services, with errors that name the field."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fastserve.serving.errors import first_error

MessageT = TypeVar("MessageT", bound=BaseModel)


def parse_message(kind: type[MessageT], content: bytes) -> MessageT:
    """Decode and validate a message. Raises InvalidRequestError."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise first_error(error) from None
