"""Tokens that files beside tokenizer.json add to a tokenizer, as transformers adds them.

tokenizer_config.json's `added_tokens_decoder` has all of them; older folders have added_tokens.json and
special_tokens_map.json instead. Special tokens that the files name (`eos_token`, ...) are added if missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from fastserve.text.model_files import read_json, token_text

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer_config.json, with the special tokens of older folders. Raises StartupError."""
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return config | read_json(folder / "special_tokens_map.json")


def add_tokens(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """`config`: see `read_config`."""
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        added = {int(token_id): _token(value) for token_id, value in config["added_tokens_decoder"].items()}
    else:
        special = {text for value in _named(config) if (text := token_text(value)) is not None}
        special |= {text for value in _extra(config) if (text := token_text(value)) is not None}
        for text, token_id in read_json(folder / "added_tokens.json").items():
            added[token_id] = AddedToken(text, normalized=text not in special, special=text in special)
        added |= tokenizer.get_added_tokens_decoder()
    tokens = [added[token_id] for token_id in sorted(added)]
    known = {token.content for token in (*tokens, *tokenizer.get_added_tokens_decoder().values())}
    named = [_token(value) for value in _named(config)]
    for token in (*named, *map(_token, _extra(config))):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    names = {token.content for token in named}
    for token in tokens:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(tokens)


def _named(config: dict[str, Any]) -> Iterator[Any]:
    """Values of the fields that name a special token."""
    others = (name for name in config if name.endswith("_token") and name not in _NAMES)
    for name in (*_NAMES, *others):
        if token_text(config.get(name)) is not None:
            yield config[name]
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        yield from extra.values()


def _extra(config: dict[str, Any]) -> Iterator[Any]:
    """Special tokens without a field of their own."""
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(config.get(name), list):
            yield from config[name]


def _token(value: Any) -> AddedToken:
    """A token as these files write it: its text, or an object with `content` and flags."""
    if isinstance(value, dict):
        return AddedToken(str(value["content"]), **{flag: bool(value[flag]) for flag in _FLAGS if flag in value})
    return AddedToken(str(value), special=True)
