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
from tokenizers import decoders, pre_tokenizers

from fastserve.errors import StartupError
from fastserve.text.added_tokens import add_tokens, read_config
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
from fastserve.text.model_files import configured_eos_ids, read_json, token_text
from fastserve.text.prompt_length import max_token_chars

_LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
"""Special tokens of LlamaTokenizer where a folder names none."""


class FastTokenizer:
    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{folder / 'tokenizer.json'} cannot be read: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = read_config(folder)
        self._tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        built_by_llama = _is_built_by_llama(self._tokenizer, folder, config)
        if built_by_llama:
            config = _LLAMA_TOKENS | config
        try:
            add_tokens(self._tokenizer, folder, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StartupError(
                f"The added tokens in {folder} (tokenizer_config.json, added_tokens.json, special_tokens_map.json) "
                f"cannot be read: {error!r}."
            ) from error
        if built_by_llama:
            _build_like_llama(self._tokenizer, config)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        own_eos = self._id_of(token_text(config.get("eos_token")))
        eos = configured_eos_ids(folder) + (() if own_eos is None else (own_eos,))
        self._eos_token_ids = tuple(dict.fromkeys(eos))
        first = self.encode("", add_special_tokens=True)
        self._bos_text: str | None = self._tokenizer.id_to_token(first[0]) if first else None
        decoder = self._tokenizer.decoder
        # BPE tokens contain their spaces: transformers ignores the flag for them.
        self._cleans_up = config.get("clean_up_tokenization_spaces") is True and not isinstance(
            self._tokenizer.model, tokenizers.models.BPE
        )
        rule = None
        if decoder is not None and not self._cleans_up:
            rule = rule_of_decoder(json.loads(decoder.__getstate__()))
        token_of_id = self._tokenizer.id_to_token
        self._table = None if rule is None else PieceTable(rule, token_of_id, self._special_ids)
        self._table_with_special = None if rule is None else PieceTable(rule, token_of_id, frozenset())
        self._max_token_chars = max_token_chars(self._tokenizer)

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self._tokenizer.token_to_id(text)

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

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids, skip_special_tokens=True)

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


def _is_built_by_llama(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> bool:
    """Whether transformers takes the vocabulary alone from tokenizer.json and builds the rest in LlamaTokenizer."""
    return (
        config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        and read_json(folder / "config.json").get("model_type") == "llama"
        and isinstance(tokenizer.model, tokenizers.models.BPE)
        and tokenizer.model.byte_fallback
    )


def _build_like_llama(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
