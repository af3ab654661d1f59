"""Common parts of OpenAI's answer formats: usage, tokens with logprobs, server-sent events."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
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
    accepted_prediction_tokens: int | None = None
    """Tokens of the request's prediction that the answer has; None: the request has no prediction."""
    rejected_prediction_tokens: int | None = None
    """The other tokens of the prediction."""
    reasoning_tokens: int | None = None
    """Tokens of the answer that are reasoning; None: it has none by its nature."""

    def as_dict(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        details = {
            name: count
            for name in ("reasoning_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")
            if (count := getattr(self, name)) is not None
        }
        return usage | {"completion_tokens_details": details} if details else usage


@dataclass(frozen=True)
class DecodedToken:
    """A token's bytes, with its logprob and the top logprobs at its position."""

    data: bytes
    logprob: float | None
    """None for the first token of a prompt."""
    top: list[tuple[int, bytes, float]]
    """Id, bytes and logprob of each."""
    text_offset: int
    """Characters of the text before the token."""
    token_id: int

    @property
    def text(self) -> str:
        return token_text(self.data)


def token_text(data: bytes) -> str:
    """A token's name in logprobs: its text, or for a part of a character its bytes, such as `bytes:\\xe4\\xbd`:
    as U+FFFD all such tokens would have one name."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_id_name(token_id: int) -> str:
    """A token's name in logprobs with `return_tokens_as_token_ids`."""
    return f"token_id:{token_id}"


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


OBFUSCATED_BYTES = 64
_NO_OBFUSCATION = b',"obfuscation":""'
NO_FIELDS: Mapping[str, Any] = {}


def _more_fields(fields: Mapping[str, Any]) -> bytes:
    """Fields of a JSON object that come after others."""
    return b"," + encode_json(fields)[1:-1] if fields else b""


class ChunkStream:
    """Writes the chunks of one stream. Their common fields are serialized once."""

    def __init__(
        self, head: dict[str, Any], content_field: str, *, include_usage: bool, obfuscates: bool = False
    ) -> None:
        """`head`: the first fields of each chunk. `content_field`: the field of a choice with its new content.
        `obfuscates`: whether random characters make the length of each chunk a multiple of OBFUSCATED_BYTES."""
        self._head = b"data: " + encode_json(head)[:-1] + b',"choices":['
        self._include_usage = include_usage
        choice = b'{"index":%%d,"%b":%%b,"logprobs":%%b,"finish_reason":%%b%%b}' % content_field.encode()
        self._template = self._head.replace(b"%", b"%%") + choice + b"]%b%b}\n\n"
        self._no_usage = b',"usage":null' if include_usage else b""
        self._obfuscates = obfuscates

    def chunk(
        self,
        index: int,
        content: bytes,
        logprobs: bytes = b"null",
        finish_reason: bytes = b"null",
        more_of_choice: Mapping[str, Any] = NO_FIELDS,
        more: Mapping[str, Any] = NO_FIELDS,
    ) -> bytes:
        """A chunk of the choice `index`. `content`, `logprobs` and `finish_reason` are encoded JSON. `more_of_choice`:
        further fields of the choice; `more`: of the chunk, such as its usage."""
        fields = self._no_usage + _more_fields(more) if "usage" not in more else _more_fields(more)
        choice = (index, content, logprobs, finish_reason, _more_fields(more_of_choice))
        written = self._template % (*choice, fields, b"")
        if not self._obfuscates:
            return written
        num_chars = -(len(written) + len(_NO_OBFUSCATION)) % OBFUSCATED_BYTES
        noise = "".join(random.choices(string.ascii_letters, k=num_chars))
        return self._template % (*choice, fields, _more_fields({"obfuscation": noise}))

    def end(self, usage: Usage) -> bytes:
        """The end of the stream, after a chunk with the usage if requested."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + encode_json(usage.as_dict()) + b"}\n\n" + DONE
