"""Tokenizes prompts, and refuses those that are too long, where possible before tokenizing them."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.errors import ContextLengthError, InvalidRequestError
from fastserve.observability.text import printable
from fastserve.openai.body import invalid
from fastserve.text.chat_template import MAX_RENDERED_CHARS
from fastserve.text.prompt_length import min_num_tokens
from fastserve.text.tokenizer import Tokenizer

_CUT_CHARS = 4096


def cut(ids: list[int], limit: int, *, cuts_end: bool) -> list[int]:
    """The first or the last `limit` ids."""
    if len(ids) <= limit:
        return ids
    return ids[:limit] if cuts_end else ids[len(ids) - limit :]


class PromptEncoder:
    """Thread-safe: it has no state besides the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length

    @property
    def max_chars(self) -> int:
        """Length in characters above which a text cannot fit in the context."""
        per_token = self._tokenizer.max_token_chars
        return MAX_RENDERED_CHARS if per_token is None else min(MAX_RENDERED_CHARS, self._context_length * per_token)

    def encode(
        self, text: str, param: str, *, add_special_tokens: bool, limit: int | None = None, cuts_end: bool = False
    ) -> list[int]:
        """Tokenize a prompt, and cut it to `limit` tokens, from its beginning or its end; special tokens that the
        tokenizer adds before it stay. Raises ContextLengthError, or InvalidRequestError if it has no tokens or unknown
        ones.
        """
        if limit is None:
            self._check_min_tokens(text, param)
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            limit = min(limit, self._context_length)
            ids = self._encode_cut(text, limit, add_special_tokens=add_special_tokens, cuts_end=cuts_end)
        if not ids:
            raise invalid(param, "", "It has no tokens; give at least one character.")
        if max(ids) >= self._vocab_size:
            # A tokenizer may have added tokens beyond the model's embedding matrix, which would crash the engine.
            token_id = next(token_id for token_id in ids if token_id >= self._vocab_size)
            token = printable(self._tokenizer.token_bytes(token_id).decode(errors="replace"), 80)
            raise InvalidRequestError(
                f"Invalid value for '{param}': the tokenizer makes token id {token_id} of '{token}', but ids of this "
                f"model run from 0 to {self._vocab_size - 1}. Leave this text out.",
                param=param,
            )
        return ids

    def _encode_cut(self, text: str, limit: int, *, add_special_tokens: bool, cuts_end: bool) -> list[int]:
        per_token = self._tokenizer.max_token_chars
        # Tokens far from the cut do not depend on the text beyond it, so only a part of a long text is tokenized.
        max_chars = len(text) if per_token is None else _CUT_CHARS + 2 * limit * per_token
        text = text[:max_chars] if cuts_end else text[-max_chars:]
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        added = self._tokenizer.encode("", add_special_tokens=True) if add_special_tokens else []
        num_kept = len(added) if added and ids[: len(added)] == added and len(added) < limit else 0
        return ids[:num_kept] + cut(ids[num_kept:], limit - num_kept, cuts_end=cuts_end)

    def encode_rendered(self, text: str) -> list[int]:
        """Tokenize a prompt that a FastChat client rendered, with a BOS token unless the text begins with one."""
        return self.encode(text, "prompt", add_special_tokens=not self._has_bos(text))

    def count_rendered(self, text: str) -> int:
        """Number of tokens of `encode_rendered`. For a text far beyond the context it is a lower bound."""
        lower_bound = min_num_tokens(self._tokenizer, text, self._context_length)
        if lower_bound > self._context_length:
            return lower_bound
        return len(self._tokenizer.encode(text, add_special_tokens=not self._has_bos(text)))

    def check_token_ids(self, ids: Sequence[int], param: str) -> None:
        """Validate a prompt sent as token ids. Raises InvalidRequestError or ContextLengthError."""
        self.max_output_tokens(len(ids), param)
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < self._vocab_size)
            raise invalid(param, wrong, f"Token ids of this model run from 0 to {self._vocab_size - 1}.")

    def max_output_tokens(self, num_tokens: int, param: str) -> int:
        """Tokens left in the context for the answer to a prompt of `num_tokens`. Raises ContextLengthError if none."""
        num_left = self._context_length - num_tokens
        if num_left < 1:
            raise self._too_long(str(num_tokens), param)
        return num_left

    def too_many_chars(self, num_chars: int, param: str) -> ContextLengthError:
        """The error for a text with more than `max_chars` characters."""
        per_token = self._tokenizer.max_token_chars
        return self._too_long("too many" if per_token is None else f"at least {num_chars // per_token}", param)

    def _check_min_tokens(self, text: str, param: str) -> None:
        lower_bound = min_num_tokens(self._tokenizer, text, self._context_length)
        if lower_bound > self._context_length:
            raise self._too_long(f"at least {lower_bound}", param)

    def _too_long(self, num_tokens: str, param: str) -> ContextLengthError:
        return ContextLengthError(
            f"This model's maximum context length is {self._context_length} tokens. However, your {param} resulted "
            f"in {num_tokens} tokens, and the answer needs at least one. Please reduce the length of the {param}.",
            param=param,
        )

    def _has_bos(self, text: str) -> bool:
        bos = self._tokenizer.bos_text
        return bos is not None and text.startswith(bos)
