"""Tokenizer classes of transformers that take the vocabulary alone from tokenizer.json, and make the other parts (the
normalizer, the pre-tokenizer, the decoder) themselves.

Which class AutoTokenizer chooses follows from tokenizer_config.json and from the type of the model. The cases that are
met often are decided here; in all others, transformers is asked (`NeedsTransformers`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from fastserve.gguf.pre_tokenizers import PRE_TOKENIZERS
from fastserve.text.model_files import read_json

logger = logging.getLogger(__name__)

COMPLETE_FILE = "fastserve_complete_file"
"""Field of tokenizer_config.json: tokenizer.json is used as it is, whatever transformers would make of it."""


class NeedsTransformers(Exception):
    """Only transformers knows what it makes of this folder."""


@dataclass(frozen=True)
class Parts:
    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer
    decoder: decoders.Decoder


@dataclass(frozen=True)
class TokenizerClass:
    name: str
    parts: Callable[[Mapping[str, Any]], Parts]
    """From the fields of tokenizer_config.json."""
    tokens: Mapping[str, str]
    """Special tokens where a folder names none."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the BPE model that differ from the library's defaults."""
    adds_no_ends: bool = False
    """Whether it drops the tokens that tokenizer.json adds around a text."""

    def build(self, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        """Replace the parts of a tokenizer.json by those of the class."""
        before = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
        parts = self.parts(config)
        tokenizer.normalizer = parts.normalizer
        tokenizer.pre_tokenizer = parts.pre_tokenizer
        tokenizer.decoder = parts.decoder
        for name, value in {**_MODEL_DEFAULTS, **self.model}.items():
            setattr(tokenizer.model, name, value)
        if self.adds_no_ends:
            tokenizer.post_processor = None
        if (_state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)) != before:
            logger.info(
                "tokenizer.json is read as transformers reads it: its class %s replaces how the file splits texts",
                self.name,
            )


def find_class(tokenizer: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> TokenizerClass | None:
    """The class that makes its own parts; None if tokenizer.json is used as it is. Raises NeedsTransformers."""
    model = read_json(folder / "config.json")
    model_type = str(model.get("model_type") or "")
    if config.get(COMPLETE_FILE):
        return None
    if model_type in _ALWAYS_BY_TYPE:
        return _served(_BY_TYPE[model_type], tokenizer)
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if named is None:
        if model_type in _TYPES_WITHOUT_CLASS or not model_type:
            return None
        if model_type in _BY_TYPE:
            return _served(_BY_TYPE[model_type], tokenizer)
        raise NeedsTransformers(f"no tokenizer class for {model_type}")
    name = str(named).removesuffix("Fast")
    if name in _GENERIC_CLASSES:
        return None
    if name == LLAMA.name and "ByteLevel" in f"{_state(tokenizer.pre_tokenizer)}{_state(tokenizer.decoder)}":
        return None
    if model_type in _TYPES_AS_IN_FILE:
        return None
    if name in _CLASSES and (model_type in _TYPES_WITHOUT_CLASS or model_type in _BY_TYPE or not model_type):
        return _served(_CLASSES[name], tokenizer)
    raise NeedsTransformers(f"{name} for {model_type}")


def _served(found: TokenizerClass, tokenizer: tokenizers.Tokenizer) -> TokenizerClass:
    if isinstance(tokenizer.model, tokenizers.models.BPE):
        return found
    raise NeedsTransformers(f"{found.name} of another model than BPE")


def _state(part: Any) -> str:
    return "" if part is None else part.__getstate__().decode()


_MODEL_DEFAULTS: Mapping[str, Any] = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _llama_parts(config: Mapping[str, Any]) -> Parts:
    prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return Parts(
        None,
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False),
        decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts),
    )


def _gemma_parts(config: Mapping[str, Any]) -> Parts:
    return Parts(
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )


def _gpt2_parts(config: Mapping[str, Any]) -> Parts:
    return Parts(None, _byte_level(config), decoders.ByteLevel())


def _gpt_neox_parts(config: Mapping[str, Any]) -> Parts:
    return Parts(normalizers.NFC(), _byte_level(config), decoders.ByteLevel())


def _qwen_parts(config: Mapping[str, Any], pre_tokenizer: str = "qwen2") -> Parts:
    [pattern] = PRE_TOKENIZERS[pre_tokenizer].patterns
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return Parts(
        normalizers.NFC(),
        pre_tokenizers.Sequence([split, _byte_level(config, use_regex=False)]),
        decoders.ByteLevel(),
    )


def _qwen3_5_parts(config: Mapping[str, Any]) -> Parts:
    return _qwen_parts(config, "qwen35")


def _byte_level(config: Mapping[str, Any], *, use_regex: bool = True) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")), use_regex=use_regex)


_END_OF_TEXT = "<|endoftext|>"
_SENTENCEPIECE_MODEL = {"fuse_unk": True, "byte_fallback": True}
LLAMA = TokenizerClass(
    "LlamaTokenizer",
    _llama_parts,
    {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    _SENTENCEPIECE_MODEL,
)
GEMMA = TokenizerClass(
    "GemmaTokenizer",
    _gemma_parts,
    {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    {**_SENTENCEPIECE_MODEL, "unk_token": "<unk>"},
)
_GPT2_TOKENS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT)
GPT2 = TokenizerClass("GPT2Tokenizer", _gpt2_parts, _GPT2_TOKENS)
GPT_NEOX = TokenizerClass(
    "GPTNeoXTokenizer", _gpt_neox_parts, {**_GPT2_TOKENS, "pad_token": "<|padding|>"}, adds_no_ends=True
)
_QWEN_TOKENS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END_OF_TEXT)
QWEN2 = TokenizerClass("Qwen2Tokenizer", _qwen_parts, _QWEN_TOKENS)
QWEN3_5 = TokenizerClass("Qwen3_5Tokenizer", _qwen3_5_parts, _QWEN_TOKENS)

_CLASSES = {known.name: known for known in (LLAMA, GEMMA, GPT2, GPT_NEOX, QWEN2, QWEN3_5)}
_GENERIC_CLASSES = frozenset({"PreTrainedTokenizer", "TokenizersBackend", "BloomTokenizer"})
_BY_TYPE: Mapping[str, TokenizerClass] = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "codegen", "opt", "phi"), GPT2),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo", "olmoe", "mamba"), GPT_NEOX),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), GEMMA),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"), QWEN2),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe"), QWEN2),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), QWEN3_5),
}
"""The class of a type of model, for a folder that names none."""
_ALWAYS_BY_TYPE = frozenset({"qwen2", "qwen3_5", "qwen3_5_moe"})
"""Types whose class is taken whatever the folder names."""
_TYPES_WITHOUT_CLASS = frozenset({"llama"})
"""Types without a class of their own: a folder's is taken."""
_TYPES_AS_IN_FILE = frozenset(
    {"mistral", "mixtral", "ministral", "ministral3", "phi3", "phimoe", "granite", "granitemoe", "granitemoehybrid"}
    | {"olmo2", "olmo3", "stablelm", "jamba", "nemotron", "internlm3", "minicpm3", "glm", "glm4", "glm4_moe"}
)
"""Types for which tokenizer.json is used as it is, whatever class is named."""
