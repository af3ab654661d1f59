"""Tokenizers of the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Sequence

import tokenizers

from fastserve.text.detokenizer import (
    Detokenizer,
    PieceDetokenizer,
    PieceTable,
    WindowDetokenizer,
    clean_up_spaces,
    is_incomplete,
    may_be_cleaned_up,
    rule_of_decoder,
)
from fastserve.text.prompt_length import max_token_chars


class FastTokenizer:
    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, eos_token_ids: Sequence[int] = (), cleans_up: bool = False
    ) -> None:
        """`cleans_up`: whether spaces before punctuation and contractions are removed from its texts."""
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        first = self.encode("", add_special_tokens=True)
        self._bos_text: str | None = self._tokenizer.id_to_token(first[0]) if first else None
        self._cleans_up = cleans_up
        decoder, rule = self._tokenizer.decoder, None
        if decoder is not None and not cleans_up:
            rule = rule_of_decoder(json.loads(decoder.__getstate__()))
        token_of_id = self._tokenizer.id_to_token
        self._table = None if rule is None else PieceTable(rule, token_of_id, self._special_ids)
        self._table_with_special = None if rule is None else PieceTable(rule, token_of_id, frozenset())
        self._max_token_chars = max_token_chars(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def bos_text(self) -> str | None:
        return self._bos_text

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    @property
    def max_token_chars(self) -> int | None:
        return self._max_token_chars

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Not `encode`, which is slower and holds the GIL, so that a thread would not help.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_pair(self, text: str, other: str) -> tuple[list[int], list[int]]:
        encoded = self._tokenizer.encode_batch_fast([(text, other)])[0]
        return encoded.ids, encoded.type_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids, skip_special_tokens=True)

    @property
    def knows_token_bytes(self) -> bool:
        return self._table is not None

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return str(self._tokenizer.id_to_token(token_id)).encode()
        if self._table is not None:
            return self._table.inner(token_id) or b""
        return self.decode([token_id]).encode()

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        table = self._table if skip_special_tokens else self._table_with_special
        if table is not None:
            return PieceDetokenizer(table, prompt_ids)
        is_undecided = may_be_cleaned_up if self._cleans_up else is_incomplete
        if skip_special_tokens:
            return WindowDetokenizer(self.decode, self._special_ids, prompt_ids, is_undecided)
        return WindowDetokenizer(self._decode_with_special, frozenset(), prompt_ids, is_undecided)

    def _decode_with_special(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids, skip_special_tokens=False)

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text = str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        return clean_up_spaces(text) if self._cleans_up else text
