"""Folders whose tokenizer is a vocabulary file alone: sentencepiece's, tiktoken's, tekken's."""

from __future__ import annotations

import base64
import functools
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve.errors import StartupError
from fastserve.text import vocabulary_files
from fastserve.text.detokenizer import PieceDetokenizer, byte_level_bytes
from fastserve.text.load_tokenizer import load_tokenizer
from tests.text import tiny_tokenizers as tiny
from tests.text.layouts import Files, differences, token, write

PACKAGES = ("sentencepiece", "google.protobuf", "tiktoken")


needs_packages = pytest.mark.skipif(
    not all(map(vocabulary_files.is_installed, PACKAGES)), reason="needs: pip install 'fastserve[slow-tokenizers]'"
)


@functools.cache
def sentencepiece(kind: str, **settings: Any) -> bytes:
    import sentencepiece as library

    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.CORPUS),
        model_writer=written,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 360, "byte_fallback": True, **settings},
    )
    return written.getvalue()


def model(kind: str, name: str | None = None, model_type: str = "llama", /, **config: Any) -> Files:
    """A folder with sentencepiece's file. `name`: its tokenizer class."""
    trainer = config.pop("trainer", {})
    files: Files = {"tokenizer.model": sentencepiece(kind, **trainer), "config.json": {"model_type": model_type}}
    if name is not None:
        files["tokenizer_config.json"] = {"tokenizer_class": name, **config}
    return files


GEMMA = {
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "user_defined_symbols": "<start_of_turn>,<end_of_turn>",
}
WITHOUT_BYTES = {"byte_fallback": False, "vocab_size": 120}
NAMED = {str(token_id): token(name) for token_id, name in enumerate(("<unk>", "<s>", "</s>"))}


def ranks() -> list[bytes]:
    vocabulary = json.loads(tiny.byte_level().to_str())["model"]["vocab"]
    return [byte_level_bytes(text) for text in sorted(vocabulary, key=vocabulary.get) if text not in tiny.SPECIAL]


def tiktoken_file() -> bytes:
    return b"".join(base64.b64encode(text) + b" %d\n" % rank for rank, text in enumerate(ranks()))


def tekken_file() -> dict[str, Any]:
    return {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(ranks()),
            "default_vocab_size": len(ranks()) + 4,
            "default_num_special_tokens": 4,
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(text).decode(), "token_str": None}
            for rank, text in enumerate(ranks())
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True}
            for rank, name in enumerate(("<unk>", "<s>", "</s>", "[INST]"))
        ],
    }


def llama3() -> Files:
    first = len(ranks())
    names = {first: "<|begin_of_text|>", first + 1: "<|end_of_text|>", first + 5: "<|eot_id|>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "add_bos_token": True,
        "added_tokens_decoder": {str(token_id): token(name) for token_id, name in names.items()},
    }
    return {"tokenizer.model": tiktoken_file(), "tokenizer_config.json": config}


SENTENCEPIECE: dict[str, Callable[[], Files]] = {
    "bpe_alone": lambda: model("bpe"),
    "unigram_alone": lambda: model("unigram"),
    "llama": lambda: model("bpe", "LlamaTokenizer"),
    "llama_legacy": lambda: model("bpe", "LlamaTokenizer", legacy=True, add_bos_token=True),
    "llama_without_prefix": lambda: model("bpe", "LlamaTokenizer", add_prefix_space=False, add_eos_token=True),
    "llama_system_prompt": lambda: model("bpe", "LlamaTokenizer", use_default_system_prompt=True),
    "llama_of_unigrams": lambda: model("unigram", "LlamaTokenizer"),
    "mistral": lambda: model("bpe", "LlamaTokenizer", "mistral", add_bos_token=True, added_tokens_decoder=NAMED),
    "gemma": lambda: model("bpe", "GemmaTokenizer", "gemma", add_bos_token=True, trainer=GEMMA),
    "t5": lambda: model("unigram", "T5Tokenizer", "t5", extra_ids=3),
    "bpe_without_bytes": lambda: model("bpe", "PreTrainedTokenizerFast", trainer=WITHOUT_BYTES),
    "unigram_without_bytes": lambda: model("unigram", "PreTrainedTokenizerFast", trainer=WITHOUT_BYTES),
    "own_symbols": lambda: model(
        "bpe", trainer={"user_defined_symbols": "hello,<|x|>", "control_symbols": "<|im_start|>,<|im_end|>"}
    ),
    "with_added_tokens": lambda: {
        **model("bpe", "LlamaTokenizer", eos_token="<|im_end|>"),
        "added_tokens.json": {"<|im_start|>": 360, "<|im_end|>": 361},
    },
}
OTHERS: dict[str, Callable[[], Files]] = {
    "tiktoken_alone": lambda: {"tokenizer.model": tiktoken_file()},
    "tiktoken_llama3": llama3,
    "tiktoken_by_its_name": lambda: {
        "tiktoken.model": tiktoken_file(),
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_end|>"]},
    },
    "tiktoken_of_llama_class": lambda: {
        "tokenizer.model": tiktoken_file(),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
    },
    "tekken": lambda: {"tekken.json": tekken_file(), "config.json": {"model_type": "mistral"}},
}


@needs_packages
@pytest.mark.parametrize("layout", [*SENTENCEPIECE, *OTHERS])
def test_a_vocabulary_file_alone_is_what_auto_tokenizer_makes_of_it(layout: str, tmp_path: Path) -> None:
    write(tmp_path, (SENTENCEPIECE | OTHERS)[layout]())
    assert differences(tmp_path) == []
    assert isinstance(load_tokenizer(tmp_path).detokenizer(), PieceDetokenizer), "in time linear in the text"


@needs_packages
def test_a_vocabulary_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    """tiktoken has a cache in which a file's content is found by its path."""
    write(tmp_path, {"tokenizer.model": tiktoken_file()})
    before = load_tokenizer(tmp_path)
    write(tmp_path, {"tokenizer.model": b"".join(tiktoken_file().splitlines(keepends=True)[:-20])})
    assert load_tokenizer(tmp_path).vocab_size == before.vocab_size - 20


@pytest.mark.parametrize(
    ("content", "missing", "remedy"),
    [
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", PACKAGES, "pip install sentencepiece protobuf"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", ("google.protobuf",), "pip install protobuf"),
        (b"IQ== 0\nIg== 1\n", PACKAGES, "pip install tiktoken"),
    ],
)
def test_what_reads_a_vocabulary_file_is_named_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, missing: tuple[str, ...], remedy: str
) -> None:
    monkeypatch.setattr(vocabulary_files, "is_installed", lambda module: module not in missing)
    monkeypatch.setitem(sys.modules, "fastserve.text.slow_tokenizer", None)  # its import would fail
    write(tmp_path, {"tokenizer.model": content})
    with pytest.raises(StartupError, match=rf"tokenizer\.model .*: {remedy}\.$"):
        load_tokenizer(tmp_path)


@needs_packages
@pytest.mark.parametrize("content", [b"", b"no model\n", b"\x00" * 100, b"IQ== 0\nnot base64 1\n", b"IQ== x\n"])
def test_a_vocabulary_file_that_cannot_be_read_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {"tokenizer.model": content})
    with pytest.raises(StartupError, match="cannot read the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
