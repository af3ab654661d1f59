"""Small tokenizers built by code: one byte-level, several like sentencepiece's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today?",
    "你好 世界 今天天气很好。",
    "naïve café über straße",
    "emoji 😀 👩‍👩‍👧 🇩🇪 and  double   spaces",
    "def f(x):\n    return x + 1\n",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

Save = Callable[..., Path]


def made_once(build: Callable[[], Tokenizer]) -> Callable[[], Tokenizer]:
    """Each call returns a copy of its own, so that callers may change it; training takes longer than copying."""

    @functools.cache
    def text() -> str:
        return build().to_str()

    @functools.wraps(build)
    def copy() -> Tokenizer:
        return Tokenizer.from_str(text())

    return copy


@made_once
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("日本", special=False)])
    return tokenizer


@made_once
def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@made_once
def sentencepiece() -> Tokenizer:
    """Like Llama 2's: a space is prepended to the text and stripped again, unknown characters become bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({char for text in CORPUS for char in text if char.isascii() and char != " "})
    pieces = ["<unk>", *SPECIAL, *bytes_, "▁", *letters, "th", "he", "▁the", "lo", "▁q"]
    merges = [("t", "h"), ("h", "e"), ("▁", "the"), ("l", "o"), ("▁", "q")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    vocabulary |= {"the": len(vocabulary)}
    model = models.BPE(
        vocab=vocabulary,
        merges=[("t", "h"), ("th", "e"), *merges[2:]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


@made_once
def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer
