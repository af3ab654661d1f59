"""Content of a message that is an array of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve.errors import UnsupportedParameterError
from fastserve.observability.text import printable
from fastserve.openai.body import invalid


def texts_of_parts(
    parts: Sequence[Any], where: str, model: str, kinds: Sequence[str] = ("text", "refusal")
) -> list[str]:
    """The texts of parts of these kinds. `where`: path of the array.

    Raises UnsupportedParameterError for a part of another kind, and InvalidRequestError for what is no part.
    """
    texts = []
    for part in parts:
        # Stops at the first invalid part, as validation stops at the first invalid message.
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in kinds and isinstance(part.get(kind), str):
            texts.append(part[kind])
        elif isinstance(kind, str) and kind != "text":
            raise UnsupportedParameterError(
                f"Content parts of type '{printable(kind, 40)}' are not supported by this model, "
                f"'{printable(model, 80)}'. Send text parts only.",
                param=where,
            )
        else:
            raise invalid(where, part, 'A text part is {"type": "text", "text": "..."}.')
    return texts
