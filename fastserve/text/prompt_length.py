"""Cheap lower bounds for the number of tokens of a text.

A text that is far too long for a model must be refused at little cost; tokenizing takes about 150 bytes of memory and
half a microsecond per character. There are two bounds. A token has at most as many characters as the longest entry of
the vocabulary, if only the vocabulary makes tokens (`max_token_chars`). And a long text is tokenized piece by piece,
only until there are more tokens than allowed.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from fastserve.text.tokenizer import Tokenizer

_PIECE_CHARS = 65_536
_USUAL_TOKEN_CHARS = 8
"""Texts with more characters than this per allowed token are counted before they are tokenized."""
_COMPOSED_CHARS = 4
"""Unicode's canonical composition combines up to four characters into one."""
_KEEPING_PRE_TOKENIZERS = frozenset({"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "UnicodeScripts"})
_SPACE_AFTER_WORD = re.compile(r"(?<=\S)\s")


def max_token_chars(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Maximum characters of a text that one token can represent.

    None if unbounded: for rules that drop or replace characters, unknown characters that are fused into one token, or
    added tokens that strip the spaces beside them.
    """
    factor, pre_tokenizer = _shrinkage(_state(tokenizer.normalizer)), _state(tokenizer.pre_tokenizer)
    if factor is None or not _keeps_all(pre_tokenizer) or not _knows_all(tokenizer.model, pre_tokenizer):
        return None
    if any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values()):
        return None
    return factor * max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _shrinkage(normalizer: dict[str, Any] | None) -> int | None:
    """Maximum number of characters that a normalizer combines into one; None if unknown."""
    match normalizer:
        case None | {"type": "Prepend" | "NFD" | "NFKD"}:
            return 1
        case {"type": "NFC" | "NFKC"}:
            return _COMPOSED_CHARS
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if content:
            return max(1, -(-len(pattern) // len(content)))
        case {"type": "Sequence", "normalizers": list(parts)}:
            factor = 1
            for part in parts:
                own = _shrinkage(part)
                if own is None:
                    return None
                factor *= own
            return factor
    return None


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps_all, pre_tokenizer["pretokenizers"]))
    return pre_tokenizer["type"] in _KEEPING_PRE_TOKENIZERS and pre_tokenizer.get("behavior") != "Removed"


def _knows_all(model: Any, pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether every character becomes part of a token: no unknown one is dropped, or fused with others."""
    if not isinstance(model, tokenizers.models.BPE):
        return False
    if model.byte_fallback or '"ByteLevel"' in json.dumps(pre_tokenizer):
        return True
    return model.unk_token is not None and not model.fuse_unk


def min_num_tokens(tokenizer: Tokenizer, text: str, limit: int) -> int:
    """Lower bound for the number of tokens of `text`, or 0 if the text is short enough to be tokenized.

    Above `limit` it proves the text too long. The cost is in proportion to `limit`, not to the text.
    """
    if tokenizer.max_token_chars is not None and len(text) > limit * tokenizer.max_token_chars:
        return -(-len(text) // tokenizer.max_token_chars)
    if len(text) <= max(_PIECE_CHARS, limit * _USUAL_TOKEN_CHARS):
        return 0
    # A cut may split a token into several, which must not be counted.
    margin = tokenizer.max_token_chars or 256
    count = start = 0
    while start < len(text):
        end = _cut(text, start + _PIECE_CHARS)
        count += max(0, len(tokenizer.encode(text[start:end], add_special_tokens=False)) - margin)
        if count > limit:
            return count
        start = end
    return 0


def _cut(text: str, at: int) -> int:
    """End of a piece: near `at`, before a space after a word, so that no word is split."""
    found = _SPACE_AFTER_WORD.search(text, at, min(len(text), at + 1024))
    return found.start() if found else at
