"""Tokenizers by transformers: those without a tokenizer.json (sentencepiece, tiktoken, vocabulary files, remote code),
and those of classes that read their tokenizer.json in their own way.

Most of these become a tokenizer of the `tokenizers` library, which is then used without transformers around it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TokenizersBackend

from fastserve.errors import StartupError
from fastserve.observability.text import printable
from fastserve.text.detokenizer import Detokenizer, WindowDetokenizer, is_incomplete, may_be_cleaned_up
from fastserve.text.fast_tokenizer import FastTokenizer
from fastserve.text.model_files import configured_eos_ids
from fastserve.text.tokenizer import Tokenizer
from fastserve.text.tokenizer_file import CLEANS_UP_BPE, cleans_up

_TIKTOKEN_CACHE = "TIKTOKEN_CACHE_DIR"


def read_by_transformers(folder: Path, *, trust_remote_code: bool) -> Tokenizer:
    """Raises StartupError."""
    try:
        with _without_tiktoken_cache():
            made = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # anything, of files of any content and of remote code
        cause = printable(str(error).strip().split("\n")[0], 500)
        file = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "tokenizer (it has no tokenizer.json)"
        raise StartupError(
            f"transformers cannot read the {file} of {folder}: {type(error).__name__}: {cause}"
        ) from error
    own_eos = () if made.eos_token_id is None else (int(made.eos_token_id),)
    eos_token_ids = configured_eos_ids(folder) + own_eos
    if not _adds_nothing(made):
        return SlowTokenizer(made, eos_token_ids)
    backend = made.backend_tokenizer
    return FastTokenizer(
        backend,
        eos_token_ids=eos_token_ids,
        cleans_up=bool(made.clean_up_tokenization_spaces)
        and cleans_up(backend, for_bpe=bool(getattr(made, CLEANS_UP_BPE, False))),
    )


def _adds_nothing(tokenizer: Any) -> bool:
    """Whether transformers' tokenizer encodes and decodes as the library's tokenizer inside it."""
    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(type(tokenizer), name, None) is getattr(TokenizersBackend, name, None)
        for name in ("encode", "_encode_plus", "decode", "_decode")
    )


@contextmanager
def _without_tiktoken_cache() -> Iterator[None]:
    """tiktoken caches the content of files by their paths, and would return that of a file that has been replaced."""
    before = os.environ.get(_TIKTOKEN_CACHE)
    os.environ[_TIKTOKEN_CACHE] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TIKTOKEN_CACHE]
        else:
            os.environ[_TIKTOKEN_CACHE] = before


class SlowTokenizer:
    """A tokenizer whose rules are Python code."""

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer`: one of transformers."""
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self._special_ids = frozenset(int(token_id) for token_id in tokenizer.all_special_ids)
        self._is_undecided = may_be_cleaned_up if tokenizer.clean_up_tokenization_spaces else is_incomplete
        first = self.encode("", add_special_tokens=True)
        self._bos_text = str(tokenizer.convert_ids_to_tokens(first[0])) if first else None

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

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
        return None  # its rules are Python code, which may drop or join characters

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_pair(self, text: str, other: str) -> tuple[list[int], list[int]]:
        encoded = self._tokenizer(text, other)
        ids = list(encoded["input_ids"])
        return ids, list(encoded.get("token_type_ids") or [0] * len(ids))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def knows_token_bytes(self) -> bool:
        return False

    def token_bytes(self, token_id: int) -> bytes:
        return str(self._tokenizer.decode([token_id])).encode()

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        if skip_special_tokens:
            return WindowDetokenizer(self.decode, self._special_ids, prompt_ids, self._is_undecided)
        return WindowDetokenizer(self._decode_with_special, frozenset(), prompt_ids, self._is_undecided)

    def _decode_with_special(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
