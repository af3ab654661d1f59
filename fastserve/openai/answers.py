"""What chat and completion answers have in common: usage, ids, server-sent events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
JSON = "application/json"

encode_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class TokenText:
    """One token with its logprob and the likeliest others, as bytes and in words."""

    data: bytes
    logprob: float | None
    """None for the first token of a prompt, which nothing comes before."""
    top: list[tuple[bytes, float]]
    text_offset: int
    """Characters of the text before it."""

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


def event(payload: Any) -> bytes:
    return b"data: " + encode_json(payload) + b"\n\n"
