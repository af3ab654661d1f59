"""A folder's tokenizer is what transformers' AutoTokenizer makes of the folder: ids, special tokens, texts, streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from fastserve.errors import StartupError
from fastserve.text.load_tokenizer import load_tokenizer
from tests.text import tiny_tokenizers as tiny
from tests.text.layouts import Files, differences, token, write


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


def with_digits() -> Tokenizer:
    """Byte-level, with a pre-tokenizer that none of the classes makes."""
    tokenizer = tiny.byte_level()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.model.ignore_merges = True
    return with_template(tokenizer, "<s> $A")


def folder_with_digits(name: str | None, model_type: str) -> Files:
    config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    if name is None:
        del config["tokenizer_class"]
    return {"tokenizer.json": with_digits(), "tokenizer_config.json": config, "config.json": {"model_type": model_type}}


MADE_BY_A_CLASS = [
    # the class that a folder names, and the type of its model
    *[(name, "llama") for name in ("GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizerFast", "Qwen3_5Tokenizer")],
    *[(name, "qwen3") for name in ("Qwen2TokenizerFast", "PreTrainedTokenizerFast", "LlamaTokenizerFast")],
    *[(name, "qwen2") for name in ("Qwen2Tokenizer", "PreTrainedTokenizerFast", "NeverHeardOfTokenizer")],
    *[("GPT2Tokenizer", type_) for type_ in ("granite", "mistral", "gpt_neox", "deepseek_v3", "never_heard_of")],
    *[(None, type_) for type_ in ("gpt2", "gpt_neox", "qwen3_moe", "llama", "bloom", "cohere")],
    *[("CohereTokenizerFast", "cohere"), ("BloomTokenizerFast", "bloom"), ("NeverHeardOfTokenizer", "llama")],
]
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
    **{
        f"class_{name}_for_{model_type}": partial(folder_with_digits, name, model_type)
        for name, model_type in MADE_BY_A_CLASS
    },
    "class_gemma": lambda: {
        **class_folder("GemmaTokenizer", tiny.sentencepiece, add_bos_token=True),
        "config.json": {"model_type": "gemma3_text"},
    },
    "class_gpt2_with_prefix_space": lambda: {
        **class_folder("GPT2Tokenizer", tiny.byte_level, add_prefix_space=True),
        "config.json": {"model_type": "gpt2"},
    },
    "clean_up_of_bpe_forced": lambda: generic_folder(
        tiny.byte_level,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    ),
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
    "vocab_json_and_merges_of_qwen": lambda: {
        **byte_level_vocab(),
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "unk_token": None},
        "config.json": {"model_type": "qwen2"},
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
