"""Common parts of OpenAI's answer formats: usage, tokens with logprobs, server-sent events."""

from __future__ import annotations

from collections.abc import Sequence
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
class DecodedToken:
    """A token's bytes, with its logprob and the top logprobs at its position."""

    data: bytes
    logprob: float | None
    """None for the first token of a prompt."""
    top: list[tuple[bytes, float]]
    text_offset: int
    """Characters of the text before the token."""
    token_id: int

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


def slora_event(token: dict[str, Any], finished: bool | int, **more: Any) -> bytes:
    """An event of S-LoRA's streams."""
    fields = {"token": token, "generated_text": None, "finished": finished, "details": None}
    return b"data:" + encode_json(fields | more) + b"\n\n"


SLORA_NO_TOKEN = {"id": -1, "text": "", "logprob": None, "special": True}
"""The token of an event that has none: an end that came apart from the last token, or an error."""


def slora_failure(error: Any) -> bytes:
    """The last event of a stream of S-LoRA's that fails, with OpenAI's error object."""
    return slora_event(SLORA_NO_TOKEN, -1, error=error)


def event(payload: Any) -> bytes:
    return b"data: " + encode_json(payload) + b"\n\n"


class ChunkStream:
    """Writes the chunks of one stream. Their common fields are serialized once."""

    def __init__(self, head: dict[str, Any], content_field: str, *, include_usage: bool) -> None:
        """`head`: the first fields of each chunk. `content_field`: the field of a choice with its new content."""
        self._head = b"data: " + encode_json(head)[:-1] + b',"choices":['
        self._include_usage = include_usage
        choice = b'{"index":%%d,"%b":%%b,"logprobs":%%b,"finish_reason":%%b%%b}' % content_field.encode()
        tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._template = self._head.replace(b"%", b"%%") + choice + tail

    def chunk(
        self,
        index: int,
        content: bytes,
        logprobs: bytes = b"null",
        finish_reason: bytes = b"null",
        weight_versions: Sequence[str] = (),
    ) -> bytes:
        """A chunk of the choice `index`. All values but the last are encoded JSON. `weight_versions`: of an answer that
        several versions of the weights computed."""
        versions = b',"weight_versions":' + encode_json(weight_versions) if weight_versions else b""
        return self._template % (index, content, logprobs, finish_reason, versions)

    def end(self, usage: Usage) -> bytes:
        """The end of the stream, after a chunk with the usage if requested."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + encode_json(usage.as_dict()) + b"}\n\n" + DONE
