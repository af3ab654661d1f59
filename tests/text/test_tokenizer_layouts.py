"""A folder's tokenizer is what transformers' AutoTokenizer makes of the folder: ids, special tokens, texts, streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from fastserve.errors import StartupError
from fastserve.text.load_tokenizer import load_tokenizer
from tests.text import tiny_tokenizers as tiny

TEXTS = [
    "",
    "the quick brown fox jumps over the lazy dog",
    " hello  world ,how are you today ? I do n't , they 've !",
    "你好 世界 今天天气很好。 日本",
    "naïve café über straße 😀 👩‍👩‍👧 🇩🇪",
    "def f(x):\n\treturn x + 1\n",
    "<s> the</s><|im_start|>user\nhello <|im_end|> <tool call> x",
    "a<new> b <new_special>c",
    "Привет мир مرحبا שלום ✓ ½ ²³",
]
Files = dict[str, Any]
"""JSON or text by file name; a Tokenizer for tokenizer.json."""


def token(content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, "special": special, **defaults, **flags}


def with_template(tokenizer: Tokenizer, single: str) -> Tokenizer:
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def generic(**config: Any) -> Files:
    return {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **config}}


def generic_folder(builder: Callable[[], Tokenizer], **config: Any) -> Files:
    return {"tokenizer.json": builder(), **generic(**config)}


def class_folder(name: str, builder: Callable[[], Tokenizer], **config: Any) -> Files:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return {"tokenizer.json": builder(), "tokenizer_config.json": {"tokenizer_class": name, **tokens, **config}}


def size(builder: Callable[[], Tokenizer]) -> int:
    return max(builder().get_vocab(with_added_tokens=True).values()) + 1


NEW = {
    str(size(tiny.byte_level)): token("<new>", special=False),
    str(size(tiny.byte_level) + 1): token("<new_special>"),
}


def own_tokens(builder: Callable[[], Tokenizer]) -> dict[str, Any]:
    return {
        str(token_id): token(added.content, special=added.special, normalized=added.normalized)
        for token_id, added in builder().get_added_tokens_decoder().items()
    }


def byte_level_vocab() -> Files:
    model = json.loads(tiny.byte_level().to_str())["model"]
    return {
        "vocab.json": model["vocab"],
        "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]) + "\n",
    }


def word_piece_vocab() -> str:
    vocabulary = tiny.word_piece().get_vocab()
    names = {"<s>": "[CLS]", "</s>": "[SEP]", "<|im_start|>": "[PAD]", "<|im_end|>": "[MASK]"}
    return "\n".join(names.get(name, name) for name in sorted(vocabulary, key=vocabulary.__getitem__)) + "\n"


CLASSES: list[tuple[str, Callable[[], Tokenizer], dict[str, Any]]] = [
    ("LlamaTokenizer", tiny.sentencepiece, {}),
    ("LlamaTokenizerFast", tiny.sentencepiece, {"legacy": True}),
    ("LlamaTokenizer", tiny.sentencepiece, {"add_prefix_space": False}),
    ("LlamaTokenizerFast", tiny.byte_level, {}),
    ("GPT2Tokenizer", tiny.byte_level, {"unk_token": "</s>"}),
]
LAYOUTS: dict[str, Callable[[], Files]] = {
    # tokenizer.json alone, of each kind
    "byte_level": lambda: {"tokenizer.json": tiny.byte_level()},
    "metaspace": lambda: {"tokenizer.json": tiny.metaspace()},
    "byte_fallback": lambda: {"tokenizer.json": tiny.sentencepiece()},
    "word_piece": lambda: {"tokenizer.json": tiny.word_piece()},
    # with the class that is named most often
    **{
        f"generic_{builder.__name__}": partial(generic_folder, builder, bos_token="<s>", eos_token="</s>")
        for builder in (tiny.byte_level, tiny.metaspace, tiny.sentencepiece, tiny.word_piece)
    },
    # BOS and EOS
    "template_bos": lambda: {"tokenizer.json": with_template(tiny.byte_level(), "<s> $A"), **generic()},
    "template_bos_eos": lambda: {"tokenizer.json": with_template(tiny.metaspace(), "<s> $A </s>"), **generic()},
    **{
        f"flags_bos_{bos}_eos_{eos}": partial(
            generic_folder,
            tiny.byte_level,
            bos_token="<s>",
            eos_token="</s>",
            add_bos_token=bos,
            add_eos_token=eos,
        )
        for bos in (True, False)
        for eos in (True, False)
    },
    "flag_off_template_on": lambda: {
        "tokenizer.json": with_template(tiny.byte_level(), "<s> $A"),
        **generic(bos_token="<s>", eos_token="</s>", add_bos_token=False),
    },
    # added tokens, in each of the places
    "added_in_tokenizer_config": lambda: {
        "tokenizer.json": tiny.byte_level(),
        **generic(eos_token="</s>", added_tokens_decoder={**own_tokens(tiny.byte_level), **NEW}),
    },
    "added_in_tokenizer_config_alone": lambda: {
        "tokenizer.json": tiny.byte_level(),
        **generic(eos_token="<new_special>", added_tokens_decoder=NEW),
    },
    "added_in_added_tokens_json": lambda: {
        "tokenizer.json": tiny.byte_level(),
        "added_tokens.json": {"<new>": size(tiny.byte_level), "<new_special>": size(tiny.byte_level) + 1},
        **generic(eos_token="</s>"),
    },
    "added_in_special_tokens_map": lambda: {
        "tokenizer.json": tiny.byte_level(),
        "special_tokens_map.json": {"eos_token": "</s>", "additional_special_tokens": ["<new_special>"]},
        **generic(),
    },
    "named_as_eos_only": lambda: {"tokenizer.json": tiny.byte_level(), **generic(eos_token="<new_special>")},
    "named_as_eos_object": lambda: {
        "tokenizer.json": tiny.byte_level(),
        **generic(eos_token={"__type": "AddedToken", **token("<new_special>")}),
    },
    "extra_special_tokens": lambda: {
        "tokenizer.json": tiny.byte_level(),
        **generic(eos_token="</s>", extra_special_tokens=["<new_special>"]),
    },
    "additional_special_tokens": lambda: {
        "tokenizer.json": tiny.byte_level(),
        **generic(eos_token="</s>", additional_special_tokens=["<new_special>", "<tool call>"]),
    },
    "added_strips_spaces": lambda: {
        "tokenizer.json": tiny.byte_level(),
        **generic(added_tokens_decoder={next(iter(NEW)): token("<new>", lstrip=True, rstrip=True)}),
    },
    "a_plain_token_made_special": lambda: {
        "tokenizer.json": tiny.byte_level(),
        **generic(pad_token="hello"),
    },
    # clean-up
    **{
        f"clean_up_{value}_{builder.__name__}": partial(generic_folder, builder, clean_up_tokenization_spaces=value)
        for value in (True, False)
        for builder in (tiny.byte_level, tiny.word_piece)
    },
    "split_special_tokens": lambda: {"tokenizer.json": tiny.byte_level(), **generic(split_special_tokens=True)},
    # classes that build their own parts
    **{
        f"class_{name}_{builder.__name__}_{list(flags)}": partial(class_folder, name, builder, **flags)
        for name, builder, flags in CLASSES
    },
    # without tokenizer.json
    "vocab_json_and_merges": lambda: {
        **byte_level_vocab(),
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>"},
    },
    "vocab_json_and_merges_with_bos": lambda: {
        **byte_level_vocab(),
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True
        },
    },
    "vocab_txt": lambda: {
        "vocab.txt": word_piece_vocab(),
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"},
        "config.json": {"model_type": "bert"},
    },
    "vocab_txt_cleaned_up": lambda: {
        "vocab.txt": word_piece_vocab(),
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "clean_up_tokenization_spaces": True},
        "config.json": {"model_type": "bert"},
    },
}  # fmt: skip


def write(folder: Path, files: Files) -> None:
    for name, content in {"config.json": {"model_type": "llama"}, **files}.items():
        if isinstance(content, Tokenizer):
            content.save(str(folder / name))
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")


def differences(folder: Path) -> list[str]:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = []
    for text in TEXTS:
        for add_special_tokens in (True, False):
            expected = theirs.encode(text, add_special_tokens=add_special_tokens)
            ids = ours.encode(text, add_special_tokens=add_special_tokens)
            if ids != expected:
                found.append(f"ids of {text!r}, {add_special_tokens}: {ids} {expected}")
        for skip in (True, False):
            whole = theirs.decode(expected, skip_special_tokens=skip)
            for cut in range(len(expected) + 1):
                detokenizer = ours.detokenizer(skip_special_tokens=skip)
                pieces = [detokenizer.push(expected[:cut]), detokenizer.push(expected[cut:]), detokenizer.finish()]
                if "".join(pieces) != whole:
                    found.append(f"text of {text!r}, {skip}, cut at {cut}: {pieces} {whole!r}")
                    break
    if ours.vocab_size != len(theirs):
        found.append(f"vocabulary {ours.vocab_size} {len(theirs)}")
    if theirs.eos_token_id is not None and theirs.eos_token_id not in ours.eos_token_ids:
        found.append(f"eos {ours.eos_token_ids} {theirs.eos_token_id}")
    hidden = {
        token_id
        for token_id in range(len(theirs))
        if theirs.decode([token_id], skip_special_tokens=True) != theirs.decode([token_id], skip_special_tokens=False)
    }
    if hidden != ours.special_ids:
        found.append(f"special {sorted(ours.special_ids)} {sorted(hidden)}")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folders_tokenizer_is_what_auto_tokenizer_makes_of_it(layout: str, tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS[layout]())
    assert differences(tmp_path) == []


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": []}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"x": token("<new>")}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"400": {"special": True}}}},
        {"added_tokens.json": {"<new>": "x"}},
        {"special_tokens_map.json": "[]"},
    ],
)
def test_added_tokens_that_cannot_be_read_are_a_sentence(tmp_path: Path, files: Files) -> None:
    write(tmp_path, {"tokenizer.json": tiny.byte_level(), **files})
    with pytest.raises(StartupError, match=r"added tokens|special_tokens_map"):
        load_tokenizer(tmp_path)
