"""Tokenizers without a tokenizer.json (sentencepiece, tiktoken, remote code), by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from fastserve.errors import StartupError
from fastserve.text.detokenizer import Detokenizer, WindowDetokenizer
from fastserve.text.model_files import configured_eos_ids


class SlowTokenizer:
    def __init__(self, folder: Path, *, trust_remote_code: bool) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise StartupError(
                f"{folder} has no tokenizer.json, and transformers cannot read its tokenizer: {error} "
                "(sentencepiece and tiktoken come with: pip install 'fastserve[slow-tokenizers]')."
            ) from error
        eos = configured_eos_ids(folder)
        if self._tokenizer.eos_token_id is not None:
            eos += (int(self._tokenizer.eos_token_id),)
        self._eos_token_ids = tuple(dict.fromkeys(eos))
        self._special_ids = frozenset(int(token_id) for token_id in self._tokenizer.all_special_ids)
        first = self.encode("", add_special_tokens=True)
        self._bos_text = str(self._tokenizer.convert_ids_to_tokens(first[0])) if first else None

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

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        return str(self._tokenizer.decode([token_id])).encode()

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        if skip_special_tokens:
            return WindowDetokenizer(self.decode, self._special_ids, prompt_ids)
        return WindowDetokenizer(self._decode_with_special, frozenset(), prompt_ids)

    def _decode_with_special(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
