"""The tokenizer as the worker sees it."""

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
        """The text of the token that encoding with special tokens puts first; None when it puts none."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that steer the model and write nothing into an answer."""
        ...

    @property
    def max_token_chars(self) -> int | None:
        """No token stands for more characters of a text than this; None when nothing is known of it."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token writes inside a text; a special token's are its name."""
        ...

    def detokenizer(self) -> Detokenizer: ...
