"""Requests about tokens: vLLM's and llama.cpp's `/tokenize` and `/detokenize`, and FastChat's `token_check`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from fastserve.errors import InvalidRequestError
from fastserve.openai.body import Flag, Integer, at_most, invalid


class TokenizeRequest(BaseModel):
    """Either a text or a chat. A chat may have all fields of /v1/chat/completions that make its prompt."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str | None = None
    """Default: the model, if only one is served."""
    prompt: str | None = None
    """The text."""
    content: str | None = None
    """The text, under llama.cpp's name."""
    messages: Any = None
    """A chat in place of a text."""
    add_special_tokens: Flag | None = None
    """Whether the tokenizer's own special tokens, such as BOS, are added. Default: on for texts, off for chats and for
    `content`."""
    add_special: Flag | None = None
    """The same, under llama.cpp's name."""
    parse_special: Flag | None = None
    """Accepted; no effect: special tokens in a text are read as such."""
    return_token_strs: Flag | None = None
    """Whether the answer has the texts of the tokens, `token_strs`."""
    with_pieces: Flag | None = None
    """Whether `tokens` are objects with `id` and `piece`, as llama.cpp gives them."""

    def text(self) -> str | None:
        """The text; None: the request has a chat. Raises InvalidRequestError unless it has exactly one of them."""
        given = [name for name in ("prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"Give one of 'prompt' (a text) and 'messages' (a chat), not {len(given)}.",
                param=given[1] if given else "prompt",
                code=None if given else "missing_required_parameter",
            )
        return self.prompt if self.content is None else self.content

    def adds_special_tokens(self) -> bool:
        """For a text."""
        for value in (self.add_special_tokens, self.add_special):
            if value is not None:
                return value
        return self.content is None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str | None = None
    """Default: the model, if only one is served."""
    tokens: Any
    """An array of token ids. The answer has their text as `prompt` and as `content`, without special tokens."""

    def token_ids(self, vocab_size: int) -> list[int]:
        """Raises InvalidRequestError."""
        try:
            ids = msgspec.convert(self.tokens, list[int])
        except msgspec.ValidationError:
            raise invalid("tokens", self.tokens, "Give an array of token ids, which are integers.") from None
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
            raise invalid("tokens", wrong, f"Token ids of this model run from 0 to {vocab_size - 1}.")
        return ids


class TokenCheckItem(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str
    """The same for all items of a request."""
    prompt: str
    """The text."""
    max_tokens: Integer = Field(0, ge=0)
    """Tokens of the answer."""


class TokenCheckRequest(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    prompts: Annotated[list[TokenCheckItem], Field(min_length=1, fail_fast=True), at_most("max_prompts", "prompts")]
    """Prompts to check: does each fit into the context together with its answer?"""
