"""The vocabulary of a GGUF file: tokens, special tokens, and end tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fastserve.errors import StartupError
from fastserve.gguf.file import Gguf

PREFIX = "tokenizer.ggml."
_END_TEXTS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>", "<|end_of_text|>", "<turn|>", "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
}  # fmt: skip
"""Tokens that end an answer in every model that has them, besides those that the metadata names."""
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "bert": {"bos": 101, "seperator": 102, "unknown": 100}}
"""Ids for missing keys, by kind of tokenizer. The spelling is the format's."""


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    kind: str
    """Kind of tokenizer: gpt2, llama, bert, ..."""
    texts: tuple[str, ...]
    """By token id, without duplicates."""
    types: tuple[int, ...]
    scores: tuple[float, ...]
    """Empty where the kind has none."""
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    pad_id: int | None
    separator_id: int | None
    end_ids: tuple[int, ...]
    """All tokens that end an answer, the model's EOS first."""

    def is_special(self, token_id: int) -> bool:
        """Whether the token writes no text into an answer."""
        return self.types[token_id] in (TokenType.CONTROL, TokenType.UNKNOWN) or token_id in self.end_ids

    def text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.texts[token_id]


def read_vocabulary(file: Gguf) -> Vocabulary:
    """Raises StartupError when the file has none, or one that contradicts itself."""
    kind = str(file.scalar(f"{PREFIX}model", str, "none"))
    texts = file.metadata.get(f"{PREFIX}tokens")
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise StartupError(
            f"{file.file} holds no vocabulary: put config.json and the tokenizer of its model beside it."
        )
    types = _per_token(file, "token_type", len(texts)) or [TokenType.NORMAL] * len(texts)
    texts = _unique(texts)

    def token_id(key: str) -> int | None:
        found = file.scalar(f"{PREFIX}{key}_token_id", int, _DEFAULT_IDS.get(kind, {}).get(key))
        # As llama.cpp does, ids beyond the vocabulary are ignored.
        return found if found is not None and 0 <= found < len(texts) else None

    named = [token_id(key) for key in _END_KEYS]
    by_text = [
        index for index, text in enumerate(texts)
        # </s> may be an ordinary word of HTML.
        if text in _END_TEXTS and (types[index] != TokenType.NORMAL or text.startswith("<|"))
    ]  # fmt: skip
    return Vocabulary(
        kind=kind,
        texts=tuple(texts),
        types=tuple(types),
        scores=tuple(_per_token(file, "scores", len(texts))),
        bos_id=token_id("bos"),
        eos_id=token_id("eos"),
        unknown_id=token_id("unknown"),
        pad_id=token_id("padding"),
        separator_id=token_id("seperator"),
        end_ids=tuple(dict.fromkeys([index for index in named if index is not None] + by_text)),
    )


def _per_token(file: Gguf, key: str, count: int) -> list[Any]:
    values = file.metadata.get(f"{PREFIX}{key}", [])
    if not isinstance(values, list) or len(values) not in (0, count):
        raise StartupError(f"{file.file}: {PREFIX}{key} has not one entry for each of the {count} tokens.")
    return values


def _unique(texts: list[str]) -> list[str]:
    """Rename empty texts and all but the last of equal ones: a text means the last token that has it."""
    last = {text: index for index, text in enumerate(texts)}
    return [text if text and last[text] == index else f"[UNUSED_{index}_{text}]" for index, text in enumerate(texts)]
