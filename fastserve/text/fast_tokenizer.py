"""Tokenizers with a tokenizer.json, by the `tokenizers` library.

transformers' AutoTokenizer would import torch, which takes more than a second and 200 MB in a process that does not
need it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from fastserve.errors import StartupError
from fastserve.text.detokenizer import Detokenizer, PieceDetokenizer, PieceTable, WindowDetokenizer, rule_of_decoder
from fastserve.text.model_files import configured_eos_ids, read_json, token_text
from fastserve.text.prompt_length import max_token_chars


class FastTokenizer:
    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{folder / 'tokenizer.json'} cannot be read: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = read_json(folder / "tokenizer_config.json")
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._missing_bos = self._bos_to_add(config)
        self._vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        own_eos = self._id_of(token_text(config.get("eos_token")))
        eos = configured_eos_ids(folder) + (() if own_eos is None else (own_eos,))
        self._eos_token_ids = tuple(dict.fromkeys(eos))
        first = self.encode("", add_special_tokens=True)
        self._bos_text: str | None = self._tokenizer.id_to_token(first[0]) if first else None
        decoder = self._tokenizer.decoder
        rule = None if decoder is None else rule_of_decoder(json.loads(decoder.__getstate__()))
        token_of_id = self._tokenizer.id_to_token
        self._table = None if rule is None else PieceTable(rule, token_of_id, self._special_ids)
        self._table_with_special = None if rule is None else PieceTable(rule, token_of_id, frozenset())
        self._max_token_chars = max_token_chars(self._tokenizer)

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self._tokenizer.token_to_id(text)

    def _bos_to_add(self, config: dict[str, Any]) -> int | None:
        """The BOS token if tokenizer_config.json requires one that tokenizer.json's post-processor does not add."""
        bos = self._id_of(token_text(config.get("bos_token"))) if config.get("add_bos_token") is True else None
        return None if bos is None or bos in self._tokenizer.encode("").ids else bos

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
        return [self._missing_bos, *ids] if add_special_tokens and self._missing_bos is not None else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

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
        if skip_special_tokens:
            return WindowDetokenizer(self.decode, self._special_ids, prompt_ids)
        return WindowDetokenizer(self._decode_with_special, frozenset(), prompt_ids)

    def _decode_with_special(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
