"""Incremental detokenization, in time linear in the number of tokens.

The text depends only on the ids, not on how they are chunked: the returned pieces join to the text of decoding all ids
at once. A piece never ends inside a UTF-8 sequence.

Nearly every language model has one of three decoders (byte-level BPE, Metaspace, or sentencepiece's replace / byte
fallback / fuse / strip), for which each token is a fixed byte string: `PieceTable` looks them up, `PieceDetokenizer`
joins them. All others use `WindowDetokenizer`, which decodes a short window again for each piece.

One case differs from the libraries on purpose: in a run of byte-fallback tokens with invalid UTF-8, only the invalid
bytes become U+FFFD, not the whole run, since the text before them has already been sent.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

REPLACEMENT_CHARACTER = "\ufffd"
_WINDOW_TOKENS = 6
"""Preceding tokens that are decoded again as context. Enough for spaces and for a character of four bytes."""
_MAX_HELD_TOKENS = 12
"""Tokens held back while the text ends in U+FFFD; after more, it is taken as invalid and sent as it is."""


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids; return the new text, without an end that later ids may change."""
        ...

    def finish(self) -> str:
        """Return the text held back. Later ids are decoded without it as context, but not as the start of a text."""
        ...


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are written as themselves, the others as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. A token outside of the alphabet (an added token) is encoded as UTF-8."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def byte_fallback_bytes(token: str) -> bytes | None:
    """The byte of a token like <0x0A>, or None."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


@dataclass(frozen=True)
class PieceRule:
    """Rule by which a tokenizer's decoder converts tokens to bytes."""

    byte_level: bool = False
    replacement: str = ""
    """The character that represents a space; "" if there is none."""
    byte_fallback: bool = False
    drop_in_first: bool = False
    """Drop the replacement character in the first token of a text instead of converting it to a space."""
    strip_left: int = 0
    """Spaces to strip from the beginning of the text."""

    def piece(self, token: str, *, first: bool) -> bytes:
        if self.byte_level:
            return byte_level_bytes(token)
        if self.byte_fallback and (byte := byte_fallback_bytes(token)) is not None:
            return byte
        if self.replacement:
            token = token.replace(self.replacement, "" if first and self.drop_in_first else " ")
        return token.encode()


def rule_of_decoder(decoder: Mapping[str, Any] | None) -> PieceRule | None:
    """Convert the `decoder` of a tokenizer.json; None if `PieceRule` cannot express it."""
    match decoder:
        case {"type": "ByteLevel"}:
            return PieceRule(byte_level=True)
        case {"type": "Metaspace", "replacement": str(replacement), **settings}:
            prepends = settings.get("prepend_scheme", "always") != "never"
            return PieceRule(replacement=replacement, drop_in_first=prepends)
        case {"type": "Sequence", "decoders": list(parts)}:
            return _rule_of_sequence(parts)
    return None


def _rule_of_sequence(parts: list[dict[str, Any]]) -> PieceRule | None:
    replacement, byte_fallback, strip_left, fused = "", False, 0, False
    for part in parts:
        match part:
            case {"type": "ByteLevel"} if len(parts) == 1:
                return PieceRule(byte_level=True)
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": " "} if not fused:
                replacement = pattern
            case {"type": "ByteFallback"} if not fused:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                strip_left = start
            case _:
                return None
    return PieceRule(replacement=replacement, byte_fallback=byte_fallback, strip_left=strip_left)


class PieceTable:
    """The bytes of each token by a rule. Shared by all detokenizers of one tokenizer."""

    def __init__(self, rule: PieceRule, token_of_id: Callable[[int], str | None], special_ids: frozenset[int]) -> None:
        self.rule = rule
        self._token_of_id = token_of_id
        self._special_ids = special_ids
        self._known: dict[int, bytes | None] = {}

    def inner(self, token_id: int) -> bytes | None:
        """Bytes of a token that is not the first of a text; None for special and unknown tokens, which have no text."""
        try:
            return self._known[token_id]
        except KeyError:
            return self._known.setdefault(token_id, self._make(token_id, first=False))

    def first(self, token_id: int) -> bytes | None:
        return self._make(token_id, first=True)

    def _make(self, token_id: int, *, first: bool) -> bytes | None:
        token = None if token_id in self._special_ids else self._token_of_id(token_id)
        return None if token is None else self.rule.piece(token, first=first)


class PieceDetokenizer:
    def __init__(self, table: PieceTable, prompt_ids: Sequence[int] = ()) -> None:
        """`prompt_ids`: tokens that the text continues."""
        self._table = table
        self._started = any(table.inner(token_id) is not None for token_id in prompt_ids)
        self._strip_left = 0 if self._started else table.rule.strip_left
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        data = b""
        for token_id in token_ids:
            piece = self._table.inner(token_id) if self._started else self._table.first(token_id)
            if piece is not None:
                self._started = True
                data += piece
        return self._strip(self._utf8.decode(data))

    def finish(self) -> str:
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != " ":
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


def is_incomplete(text: str) -> bool:
    """Whether a text may end inside a UTF-8 sequence."""
    return text.endswith(REPLACEMENT_CHARACTER)


_CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_BEGINNINGS = tuple({text[:end] for text in _CLEANED_UP for end in range(1, len(text))})


def clean_up_spaces(text: str) -> str:
    """Remove the spaces before punctuation and contractions (transformers' `clean_up_tokenization_spaces`)."""
    for found in _CLEANED_UP:
        text = text.replace(found, found.strip(" "))
    return text


def may_be_cleaned_up(text: str) -> bool:
    """Whether a text ends in what may become part of a string that is cleaned up."""
    return is_incomplete(text) or text.endswith(_BEGINNINGS)


class WindowDetokenizer:
    """For any decoder: decodes the new tokens with and without a few preceding ones; the difference is the new text."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        hidden_ids: frozenset[int],
        prompt_ids: Sequence[int] = (),
        is_undecided: Callable[[str], bool] = is_incomplete,
    ) -> None:
        """`hidden_ids`: tokens without text. `prompt_ids`: tokens that the text continues. `is_undecided`: whether
        further tokens may change the end of a text.
        """
        self._decode = decode
        self._is_undecided = is_undecided
        self._hidden_ids = hidden_ids
        self._context = _last_visible(prompt_ids, hidden_ids)
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            if token_id not in self._hidden_ids:
                self._held.append(token_id)
                text += self._take(force=len(self._held) > _MAX_HELD_TOKENS)
        return text

    def finish(self) -> str:
        return self._take(force=True)

    def _take(self, *, force: bool) -> str:
        before = self._decode(self._context)
        after = self._decode(self._context + self._held)
        if self._is_undecided(after) and not force:
            return ""
        self._context = (self._context + self._held)[-_WINDOW_TOKENS:]
        self._held = []
        return after[len(before) :]


def _last_visible(token_ids: Sequence[int], hidden_ids: frozenset[int]) -> list[int]:
    """The last tokens that are not hidden, as many as a window takes as context."""
    visible = (token_id for token_id in reversed(token_ids) if token_id not in hidden_ids)
    return list(itertools.islice(visible, _WINDOW_TOKENS))[::-1]
