"""How many tokens a text has at least, found without tokenising all of it.

A text that is far too long for a model must cost little: tokenising takes about 150 bytes of memory and half a
microsecond a character. Two bounds are cheap. A token stands for no more characters than the longest entry of the
vocabulary has, where nothing but the vocabulary makes tokens (`max_token_chars`). And a long text is counted piece by
piece, until there are more tokens than it may have.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from fastserve.text.tokenizer import Tokenizer

_PIECE_CHARS = 65_536
_USUAL_TOKEN_CHARS = 8
"""Texts with more characters a token than this are counted before they are tokenised."""
_COMPOSED_CHARS = 4
"""Unicode's canonical composition makes one character of up to four."""
_KEEPING_PRE_TOKENIZERS = frozenset({"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "UnicodeScripts"})
_SPACE_AFTER_WORD = re.compile(r"(?<=\S)\s")


def max_token_chars(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Most characters of a text that one token of `tokenizer` can stand for.

    None when that has no bound: rules that drop or replace characters, unknown characters that are fused into one
    token, added tokens that swallow the spaces beside them.
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
    """How many characters at most a normaliser makes one of; None when that is not known."""
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
    """Whether each character becomes a token or a part of one: none is dropped, or fused with others, for being
    unknown."""
    if not isinstance(model, tokenizers.models.BPE):
        return False
    if model.byte_fallback or '"ByteLevel"' in json.dumps(pre_tokenizer):
        return True
    return model.unk_token is not None and not model.fuse_unk


def min_num_tokens(tokenizer: Tokenizer, text: str, limit: int) -> int:
    """A lower bound for the number of tokens of `text`, found at little cost; 0 when the text is to be tokenised.

    More than `limit` means that the text certainly has more. The work is in proportion to `limit`, not to the text.
    """
    if tokenizer.max_token_chars is not None and len(text) > limit * tokenizer.max_token_chars:
        return -(-len(text) // tokenizer.max_token_chars)
    if len(text) <= max(_PIECE_CHARS, limit * _USUAL_TOKEN_CHARS):
        return 0
    # Tokens that lie across a cut are counted as two, or as the few that a cut word falls apart into.
    doubt = tokenizer.max_token_chars or 256
    count = start = 0
    while start < len(text):
        end = _cut(text, start + _PIECE_CHARS)
        count += max(0, len(tokenizer.encode(text[start:end], add_special_tokens=False)) - doubt)
        if count > limit:
            return count
        start = end
    return 0


def _cut(text: str, at: int) -> int:
    """The end of a piece: before a space that follows a word, near `at`, so that words stay whole."""
    found = _SPACE_AFTER_WORD.search(text, at, min(len(text), at + 1024))
    return found.start() if found else at
