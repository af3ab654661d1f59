"""Interface of tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve.text.detokenizer import Detokenizer


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def bos_text(self) -> str | None:
        """Text of the token that is prepended with `add_special_tokens`; None if there is none."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which have no text in an answer."""
        ...

    @property
    def max_token_chars(self) -> int | None:
        """Maximum characters of a text that one token represents; None if unknown."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def encode_pair(self, text: str, other: str) -> tuple[list[int], list[int]]:
        """Ids of two texts with special tokens around them, and the token type of each."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids without special tokens."""
        ...

    @property
    def knows_token_bytes(self) -> bool:
        """Whether `token_bytes` is exact also for parts of a character."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token inside a text; for a special token, its name."""
        ...

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A detokenizer for text that continues that of `prompt_ids`; without them, for a text of its own."""
        ...
