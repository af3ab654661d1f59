"""The head of a response: its identity, which the API server chooses when it keeps a store of responses."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

_VALUE = re.compile(r"(resp_[0-9a-f]{48}) ([0-9]{1,12}) ([0-9]{1,6}) ([01])")
RESPONSE_ID = re.compile(r"resp_[0-9a-f]{48}")


def new_id(prefix: str) -> str:
    """A random id that nobody can guess, such as `resp_` with 48 hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(24)}"


@dataclass(frozen=True)
class ResponseHead:
    id: str
    created_at: int
    """Unix time in seconds."""
    num_prior_items: int = 0
    """Items at the beginning of `input` that the API server has put there, from its store."""
    is_stored: bool = False

    def encode(self) -> str:
        """The value of RESPONSE_HEADER."""
        return f"{self.id} {self.created_at} {self.num_prior_items} {int(self.is_stored)}"

    @classmethod
    def decode(cls, value: str) -> ResponseHead:
        """Raises ValueError."""
        found = _VALUE.fullmatch(value)
        if found is None:
            raise ValueError("not the head of a response")
        return cls(found[1], int(found[2]), int(found[3]), found[4] == "1")
