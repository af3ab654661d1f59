"""The lower bounds for the number of tokens of a text hold and are cheap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastserve.demo import demo_model_path
from fastserve.text.fast_tokenizer import FastTokenizer
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.text.prompt_length import max_token_chars, min_num_tokens
from tests.text import tiny_tokenizers as tiny

WORDS = st.sampled_from(
    ["the ", "quick", "\n\n", "   ", "日本", "<tool call>", "naïve", "e\u0301", "😀", "\t", "<|im_end|>", "hello"]
)
TEXTS = st.lists(WORDS, max_size=60).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@pytest.mark.parametrize("make", [tiny.byte_level, tiny.sentencepiece, tiny.metaspace])
def test_no_token_has_more_characters_than_the_bound(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = _cached(make)
    max_chars = max_token_chars(tokenizer)
    assert max_chars is not None
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) * max_chars >= len(text)


_made: dict[Callable[[], Tokenizer], Tokenizer] = {}


def _cached(make: Callable[[], Tokenizer]) -> Tokenizer:
    if make not in _made:
        _made[make] = make()
    return _made[make]


def _with(change: Callable[[Tokenizer], None]) -> Tokenizer:
    tokenizer = tiny.byte_level()
    change(tokenizer)
    return tokenizer


def _strip(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Strip()


def _remove_spaces(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _swallow_spaces(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True)])


def _drop_with_replace(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace("a", "")


def _no_bytes(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()


@pytest.mark.parametrize("change", [_strip, _remove_spaces, _swallow_spaces, _drop_with_replace, _no_bytes])
def test_where_characters_can_vanish_there_is_no_bound(change: Callable[[Tokenizer], None]) -> None:
    assert max_token_chars(tiny.byte_level()) is not None
    assert max_token_chars(_with(change)) is None


def test_unknown_characters_that_are_fused_have_no_bound() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Fuse()
    assert max_token_chars(tokenizer) is None
    assert max_token_chars(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None


def test_composition_is_allowed_for() -> None:
    tokenizer = tiny.byte_level()
    plain = max_token_chars(tokenizer)
    tokenizer.normalizer = normalizers.NFC()
    composed = max_token_chars(tokenizer)
    assert plain is not None
    assert composed == 4 * plain


@pytest.fixture(scope="module")
def demo() -> FastTokenizer:
    tokenizer = load_tokenizer(Path(demo_model_path()))
    assert isinstance(tokenizer, FastTokenizer)
    return tokenizer


class Counting:
    """Counts the characters that are tokenized."""

    def __init__(self, tokenizer: FastTokenizer, max_token_chars: int | None) -> None:
        self._tokenizer = tokenizer
        self.max_token_chars = max_token_chars
        self.num_chars = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.num_chars += len(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("text", ["word ", "a", "世界", "\n", "<|im_end|>", "x" * 50 + " "])
@pytest.mark.parametrize("known", [True, False])
def test_a_text_that_is_far_too_long_is_refused_without_tokenizing_it(
    demo: FastTokenizer, text: str, known: bool
) -> None:
    counting: Any = Counting(demo, demo.max_token_chars if known else None)
    long = text * (4_000_000 // len(text))
    assert min_num_tokens(counting, long, 2048) > 2048
    assert counting.num_chars <= (0 if known else 200_000)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS.map(lambda text: text * 300), limit=st.integers(1, 4000), known=st.booleans())
def test_the_lower_bound_is_one(demo: FastTokenizer, text: str, limit: int, known: bool) -> None:
    counting: Any = Counting(demo, demo.max_token_chars if known else None)
    assert min_num_tokens(counting, text, limit) <= len(demo.encode(text, add_special_tokens=False))
