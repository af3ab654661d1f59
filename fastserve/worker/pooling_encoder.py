"""Tokenizes texts for a model that pools: refuses, cuts or splits those that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastserve.errors import ContextLengthError, InvalidRequestError
from fastserve.openai.body import invalid
from fastserve.text.prompt_length import min_num_tokens
from fastserve.text.tokenizer import Tokenizer

LongTexts = Literal["refuse", "truncate", "chunk"]

_CHARS_PER_TOKEN = 16
"""Characters of a long text that are tokenized first, per token that is kept; more follow while they do not suffice."""
_MARGIN = 64
"""Tokens beyond those that are kept: a cut changes the last ones."""


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text's pieces: one, unless it was too long and has been split."""

    pieces: list[list[int]]
    first_length: int | None = None
    """Number of tokens with token type 0, if the text is a pair of texts."""


class TextEncoder:
    """Thread-safe: it has no state besides the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_length: int, *, lowercase: bool) -> None:
        """`max_length`: tokens that the model takes."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.max_length = max_length
        self._lowercase = lowercase
        self._before, self._after = _around(tokenizer)
        self._pair = _around_pair(tokenizer)

    def encode(
        self, text: str, name: str, *, limit: int | None, long_texts: LongTexts, add_special_tokens: bool = True
    ) -> EncodedText:
        """`limit`: cut the text to so many tokens, special ones included. Without it, `long_texts` says what happens
        to a text that the model does not take. Raises InvalidRequestError."""
        before, after = (self._before, self._after) if add_special_tokens else ([], [])
        room = min(limit or self.max_length, self.max_length) - len(before) - len(after)
        if room < 1:
            raise self._no_room(limit)
        is_cut = limit is not None or long_texts == "truncate"
        if is_cut:
            ids = self._encode_beginning(text, room)
        else:
            if long_texts == "refuse":
                self._check_min_tokens(text, name)
            ids = self._encode_content(text)
        pieces = [ids[:room]] if is_cut else [ids[at : at + room] for at in range(0, len(ids), room)] or [[]]
        if len(pieces) > 1 and long_texts == "refuse":
            raise self._too_long(len(ids) + len(before) + len(after), name)
        encoded = [before + piece + after for piece in pieces]
        if not encoded[0]:
            raise invalid(name, text, "It has no tokens.")
        return EncodedText(encoded)

    def encode_pair(self, text: str, other: str, name: str, *, limit: int | None, long_texts: LongTexts) -> EncodedText:
        """Two texts as one input of a cross-encoder. The longer one is cut first. Errors name `name`."""
        pair = self._pair
        room = min(limit or self.max_length, self.max_length) - pair.num_special
        if room < 2:
            raise self._no_room(limit)
        is_cut = limit is not None or long_texts != "refuse"
        if is_cut:
            first, second = self._encode_beginning(text, room), self._encode_beginning(other, room)
        else:
            self._check_min_tokens(text, name)
            self._check_min_tokens(other, name)
            first, second = self._encode_content(text), self._encode_content(other)
        if len(first) + len(second) > room:
            if not is_cut:
                raise self._too_long(len(first) + len(second) + pair.num_special, name)
            num_first, num_second = shares(len(first), len(second), room)
            first, second = first[:num_first], second[:num_second]
        ids = pair.before + first + pair.between + second + pair.after
        first_length = pair.first_special + len(first) if pair.has_types else len(ids)
        return EncodedText([ids], first_length)

    def check_ids(self, ids: Sequence[int], name: str, *, limit: int | None, long_texts: LongTexts) -> EncodedText:
        """The same for a text that came as token ids, which get no special tokens."""
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < self._vocab_size)
            raise invalid(name, wrong, f"Token ids of this model run from 0 to {self._vocab_size - 1}.")
        longest = min(limit or self.max_length, self.max_length)
        if len(ids) <= longest:
            return EncodedText([list(ids)])
        if limit is not None or long_texts == "truncate":
            return EncodedText([list(ids[:longest])])
        if long_texts == "refuse":
            raise self._too_long(len(ids), name)
        return EncodedText([list(ids[at : at + longest]) for at in range(0, len(ids), longest)])

    def prompt_length(self, prompt: str) -> int:
        """Number of leading tokens that a prompt before a text takes."""
        return len(self._before) + len(self._encode_content(prompt))

    def _encode_content(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text.lower() if self._lowercase else text, add_special_tokens=False)
        if ids and max(ids) >= self._vocab_size:
            raise InvalidRequestError(
                f"The text has a token that this model does not know: its ids run from 0 to {self._vocab_size - 1}, "
                f"and the tokenizer makes {max(ids)}."
            )
        return ids

    def _encode_beginning(self, text: str, num_tokens: int) -> list[int]:
        """At least the first `num_tokens` tokens, at a cost in proportion to these and not to the text."""
        num_chars = _CHARS_PER_TOKEN * (num_tokens + _MARGIN)
        while num_chars < len(text):
            ids = self._encode_content(text[:num_chars])
            if len(ids) >= num_tokens + _MARGIN:
                return ids
            num_chars *= 4
        return self._encode_content(text)

    def _check_min_tokens(self, text: str, name: str) -> None:
        lower_bound = min_num_tokens(self._tokenizer, text, self.max_length)
        if lower_bound > self.max_length:
            raise self._too_long(lower_bound, name, "at least ")

    def _too_long(self, num_tokens: int, name: str, about: str = "") -> ContextLengthError:
        return ContextLengthError(
            f"This model takes {self.max_length} tokens at most, and '{name}' has {about}{num_tokens}. Shorten it, "
            "or send truncate_prompt_tokens: -1 to have it cut.",
            param=name,
        )

    def _no_room(self, limit: int | None) -> InvalidRequestError:
        return invalid("truncate_prompt_tokens", limit, "It leaves no room for a text beside the special tokens.")


def shares(num_first: int, num_second: int, room: int) -> tuple[int, int]:
    """Tokens that are kept of each of two texts: the shorter one stays whole while the other has more than half."""
    shorter, longer = sorted((num_first, num_second))
    longer = max(shorter, room - shorter) if shorter <= room else shorter
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (shorter, longer) if num_first <= num_second else (longer, shorter)


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Special tokens before and after a text."""
    content, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    begin = _find(content, whole)
    return whole[:begin], whole[begin + len(content) :]


@dataclass(frozen=True)
class _AroundPair:
    """Special tokens around two texts."""

    before: list[int]
    between: list[int]
    after: list[int]
    has_types: bool
    """Whether the second text has token type 1."""
    first_special: int
    """Special tokens with token type 0."""

    @property
    def num_special(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def _around_pair(tokenizer: Tokenizer) -> _AroundPair:
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in "ab")
    whole, types = tokenizer.encode_pair("a", "b")
    begin = _find(first, whole)
    end = begin + len(first)
    other = end + _find(second, whole[end:])
    num_first = types.index(1) if 1 in types else len(types)
    return _AroundPair(
        whole[:begin], whole[end:other], whole[other + len(second) :], 1 in types, num_first - len(first)
    )


def _find(part: list[int], whole: list[int]) -> int:
    """Index at which `part` begins; 0 if it is nowhere."""
    starts = (at for at in range(len(whole) - len(part) + 1) if whole[at : at + len(part)] == part)
    return next(starts, 0)
