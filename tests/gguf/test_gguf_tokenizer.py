"""Tokenizers made of a GGUF file's metadata: the same tokens as the tokenizer that the file was made of."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from fastserve.errors import StartupError
from fastserve.gguf.file import Gguf, read_gguf
from fastserve.gguf.pre_tokenizers import PRE_TOKENIZERS
from fastserve.gguf.tokenizer import chat_templates, make_tokenizer, make_tokenizer_config
from fastserve.gguf.tokens import read_vocabulary
from tests.text import tiny_tokenizers as tiny

from .writing import BYTE, CONTROL, NORMAL, TEXTS, UNKNOWN, USER_DEFINED, add_tokens, smollm2_file, write_header


def made(file: Gguf) -> Tokenizer:
    return make_tokenizer(file, read_vocabulary(file))


def by_id(vocabulary: dict[str, int]) -> list[str]:
    return sorted(vocabulary, key=vocabulary.__getitem__)


def types_of(tokenizer: Tokenizer) -> list[int]:
    added = tokenizer.get_added_tokens_decoder()
    return [
        (CONTROL if added[index].special else USER_DEFINED) if index in added else NORMAL
        for index in range(tokenizer.get_vocab_size())
    ]


def byte_level_file(folder: Path, tokenizer: Tokenizer, **keys: Any) -> Gguf:
    state = json.loads(tokenizer.to_str())
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    tokens = by_id(tokenizer.get_vocab(with_added_tokens=True))
    return read_gguf(
        write_header(
            folder / "model.gguf",
            "llama",
            lambda writer: add_tokens(writer, "gpt2", tokens, types_of(tokenizer), merges=merges, **keys),
        )
    )


# ---- byte-level ---------------------------------------------------------------------------------------------------

START = "Don|'t| | pay| "
GPT2_END = "!|\n\n| x"
CUTS = {
    "llama-bpe": f"{START}|123|45| HelloWorld|!\n\n| x",
    "dbrx": f"{START}|123|45| HelloWorld|!\n\n| x",
    "glm4": f"{START}|123|45| HelloWorld|!\n\n| x",
    "qwen2": f"{START}|1|2|3|4|5| HelloWorld|!\n\n| x",
    "qwen35": f"{START}|1|2|3|4|5| HelloWorld|!\n\n| x",
    "tekken": f"{START}|1|2|3|4|5| Hello|World|!\n\n| x",
    "gpt-4o": "Don't| | pay| |123|45| Hello|World|!\n\n| x",
    "gpt-2": f"Don|'t| | pay| 12345| HelloWorld|{GPT2_END}",
    "smollm": f"{START}|1|2|3|4|5| HelloWorld|{GPT2_END}",
    "falcon": f"Don|'|t| | pay| |123|45| HelloWorld|{GPT2_END}",
    "default": f"Don|'|t| | pay| |123|45| HelloWorld|{GPT2_END}",
    "deepseek-coder": "Don|'|t| | pay| |1|2|3|4|5| HelloWorld|!|\n|\n| x",
    "deepseek-v3": f"{START}|123|45| HelloWorld|!\n\n| x",
}
"""How each kind cuts the first text."""


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return tiny.byte_level()


@pytest.mark.parametrize("name", CUTS)
def test_each_pre_tokenizer_cuts_as_its_model_was_trained(byte_level: Tokenizer, tmp_path: Path, name: str) -> None:
    tokenizer = made(byte_level_file(tmp_path, byte_level, pre=name))
    pieces = [TEXTS[0][first:last] for _, (first, last) in tokenizer.pre_tokenizer.pre_tokenize_str(TEXTS[0])]
    assert "|".join(pieces) == CUTS[name]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_each_kind_of_pre_tokenizer_is_tested() -> None:
    assert {id(PRE_TOKENIZERS[name]) for name in CUTS} == {id(kind) for kind in PRE_TOKENIZERS.values()}


def test_tokens_of_byte_pairs_are_those_of_the_tokenizer_in_the_file(byte_level: Tokenizer, tmp_path: Path) -> None:
    tokenizer = made(byte_level_file(tmp_path, byte_level, pre="gpt-2"))
    texts = [*TEXTS, *tiny.CORPUS, "a<tool call>b日本c<s></s>"]
    for text in texts:
        assert tokenizer.encode(text).ids == byte_level.encode(text).ids, text
    assert tokenizer.get_vocab() == byte_level.get_vocab()


def test_a_word_of_the_vocabulary_wins_over_merges_where_the_model_has_it_so(tmp_path: Path) -> None:
    """No merge leads to "abc"."""
    tokens, merges = ["a", "b", "c", "bc", "abc", "<s>"], ["b c"]
    types = [NORMAL] * 5 + [CONTROL]
    for name, ids in (("llama-bpe", [5, 4]), ("qwen2", [0, 3])):
        add = partial(add_tokens, kind="gpt2", tokens=tokens, types=types, merges=merges, pre=name, bos_token_id=5)
        file = read_gguf(write_header(tmp_path / f"{name}.gguf", "llama", add))
        assert made(file).encode("abc").ids == ids


def test_digits_of_a_real_model_are_cut_first() -> None:
    """As its published tokenizer does: `Digits`, then GPT-2's cuts."""
    tokenizer = made(read_gguf(smollm2_file()))
    published = Tokenizer.from_str(tokenizer.to_str())
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    rng = random.Random(0)
    characters = "".join(TEXTS)
    texts = [*TEXTS, *("".join(rng.choices(characters, k=rng.randrange(1, 60))) for _ in range(500))]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == published.encode(text).ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


# ---- sentencepiece ------------------------------------------------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def pieces_of_corpus() -> list[str]:
    """Pieces with scores by their rank, as sentencepiece trains them: every merge of a tokenizer that was trained."""
    trained = json.loads(tiny.metaspace().to_str())["model"]
    letters = sorted({char for text in tiny.CORPUS for char in text.replace(" ", "▁")} - {"\n"})
    merged = dict.fromkeys("".join(merge) for merge in trained["merges"])
    return [*(piece for piece in merged if len(piece) > 1 and "\n" not in piece), *letters]


def sentencepiece_file(folder: Path, extra: Sequence[str] = (), **keys: Any) -> tuple[Gguf, dict[str, float]]:
    pieces = pieces_of_corpus()
    tokens = [*SPECIAL, *BYTES, *pieces, *extra]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), *[USER_DEFINED] * len(extra)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0] * len(extra)
    file = write_header(
        folder / "model.gguf", "llama",
        lambda writer: add_tokens(writer, "llama", tokens, types, scores=scores, **keys),
    )  # fmt: skip
    return read_gguf(file), dict(zip(pieces, scores[259:], strict=False))


def joined_by_score(text: str, scores: dict[str, float], prefix: str = "▁") -> list[str]:
    """What sentencepiece does, slowly: join the pair that makes the best piece, the leftmost of equals."""
    parts = list(prefix + text.replace(" ", "▁"))
    while True:
        found = [
            (-scores[left + right], index)
            for index, (left, right) in enumerate(pairwise(parts))
            if left + right in scores
        ]
        if not found:
            break
        _, index = min(found)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    tokens: list[str] = []
    for part in parts:
        tokens += [part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()]
    return tokens


def test_pieces_of_sentencepiece_are_joined_by_score(tmp_path: Path) -> None:
    file, scores = sentencepiece_file(tmp_path)
    tokenizer = made(file)
    rng = random.Random(1)
    words = " ".join(tiny.CORPUS).split()
    texts = [*tiny.CORPUS, *(text for text in TEXTS if text and "<" not in text)]
    texts += [" ".join(rng.choices(words, k=8)) for _ in range(100)]
    texts += ["".join(rng.choices("thequickbrown  ", k=30)) for _ in range(100)]
    for text in texts:
        assert tokenizer.encode(text).tokens == ["<s>", *joined_by_score(text, scores)], text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("prefixed", [True, False])
def test_flags_of_sentencepiece(tmp_path: Path, prefixed: bool) -> None:
    file, scores = sentencepiece_file(
        tmp_path, ["  ", "<extra>"], add_space_prefix=prefixed, add_bos_token=not prefixed, add_eos_token=prefixed
    )
    tokenizer = made(file)
    # The prefix is put at the start of the text, and after each token that is split off.
    the = joined_by_score("the", scores, prefix="▁" if prefixed else "")
    inner = [*the, "</s>", *the, "  ", *the, "<extra>"]
    assert tokenizer.encode("the</s>the  the<extra>").tokens == ([*inner, "</s>"] if prefixed else ["<s>", *inner])
    text = "the quick" if prefixed else "the  the"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# ---- WordPiece ----------------------------------------------------------------------------------------------------


def test_word_pieces_are_those_of_the_tokenizer_in_the_file(tmp_path: Path) -> None:
    words = ["the", "quick", "un", "##want", "##ed", ",", "he", "##llo", "##s", "!", "世", "界"]
    marked = [word.removeprefix("##") if word.startswith("##") else f"▁{word}" for word in words]
    tokens = ["[UNK]", "[CLS]", "[SEP]", *marked]
    types = [CONTROL] * 3 + [NORMAL] * len(words)
    file = write_header(
        tmp_path / "model.gguf", "bert",
        lambda writer: add_tokens(
            writer, "bert", tokens, types, unknown_token_id=0, bos_token_id=1, seperator_token_id=2
        ),
    )  # fmt: skip
    found = made(read_gguf(file)).encode("The unwanted QUICK, hellos! 世界 zzz").tokens
    expected = "[CLS] the un ##want ##ed quick , he ##llo ##s ! 世 界 [UNK] [SEP]"
    assert found == expected.split()


# ---- special tokens -----------------------------------------------------------------------------------------------


def test_all_tokens_that_end_an_answer_are_found_once(tmp_path: Path) -> None:
    tokens = ["a", "<|eot_id|>", "<|end_of_text|>", "</s>", "<stop>", "<|im_end|>", "a"]
    types = [NORMAL, CONTROL, CONTROL, NORMAL, CONTROL, USER_DEFINED, NORMAL]
    file = write_header(
        tmp_path / "model.gguf", "llama",
        lambda writer: add_tokens(
            writer, "gpt2", tokens, types, merges=[], pre="qwen2", eos_token_id=4, eot_token_id=1, bos_token_id=99
        ),
    )  # fmt: skip
    vocabulary = read_vocabulary(read_gguf(file))
    # </s> is an ordinary word here: HTML has it.
    assert vocabulary.end_ids == (4, 1, 2, 5)
    assert vocabulary.bos_id is None
    assert vocabulary.texts[0] != "a"
    assert vocabulary.texts[6] == "a"
    assert [vocabulary.is_special(index) for index in range(7)] == [False, True, True, False, True, True, False]


def test_a_whole_tokenizer_in_the_metadata_is_used(byte_level: Tokenizer, tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        add_tokens(writer, "gpt2", by_id(byte_level.get_vocab()))
        writer.add_string("tokenizer.huggingface.json", byte_level.to_str())

    file = write_header(tmp_path / "model.gguf", "llama", add)
    assert json.loads(made(read_gguf(file)).to_str()) == json.loads(byte_level.to_str())


def test_chat_templates_and_named_tokens(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        add_tokens(writer, "gpt2", ["a", "<s>", "</s>"], bos_token_id=1, eos_token_id=2)
        writer.add_chat_template([{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}])

    file = read_gguf(write_header(tmp_path / "model.gguf", "llama", add))
    assert chat_templates(file) == {"default": "x", "tool_use": "y"}
    config = make_tokenizer_config(file, read_vocabulary(file))
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert "pad_token" not in config


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("gpt2", {"pre": "unheard-of", "merges": ["a b"]}, "its pre-tokenizer 'unheard-of' is not known here"),
        ("gpt2", {"pre": "gpt-2"}, r"has no tokenizer\.ggml\.merges"),
        ("gpt2", {"pre": "gpt-2", "merges": ["a q"]}, "its tokenizer does not fit together"),
        ("llama", {}, r"no tokenizer\.ggml\.scores"),
        ("rwkv", {}, "its tokenizer is of the kind 'rwkv'; gpt2, llama, bert are served"),
        ("llama", {"scores": [1.0]}, "scores has not one entry for each of the 2 tokens"),
    ],
)
def test_tokenizers_that_would_be_wrong_are_refused(
    tmp_path: Path, kind: str, keys: dict[str, Any], message: str
) -> None:
    file = write_header(tmp_path / "model.gguf", "llama", lambda writer: add_tokens(writer, kind, ["a", "b"], **keys))
    with pytest.raises(StartupError, match=message):
        made(read_gguf(file))
