"""Reads a folder's tokenizer.json by the `tokenizers` library, with what transformers adds to it.

transformers' AutoTokenizer would import torch, which takes more than a second and 200 MB in a process that does not
need it.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from fastserve.errors import StartupError
from fastserve.text.added_tokens import add_tokens, read_config
from fastserve.text.fast_tokenizer import FastTokenizer
from fastserve.text.model_files import configured_eos_ids, token_text
from fastserve.text.tokenizer_classes import find_class

CLEANS_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def read_tokenizer_file(folder: Path) -> FastTokenizer:
    """Raises StartupError, and NeedsTransformers if the file alone does not say what transformers makes of it."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(f"{folder / 'tokenizer.json'} cannot be read: {error}.") from error
    config = read_config(folder)
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    built_by = find_class(tokenizer, folder, config)
    if built_by is not None:
        config = {**built_by.tokens, **config}
    try:
        add_tokens(tokenizer, folder, config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StartupError(
            f"The added tokens in {folder} (tokenizer_config.json, added_tokens.json, special_tokens_map.json) "
            f"cannot be read: {error!r}."
        ) from error
    if built_by is not None:
        built_by.build(tokenizer, config)
    eos_text = token_text(config.get("eos_token"))
    own_eos = None if eos_text is None else tokenizer.token_to_id(eos_text)
    return FastTokenizer(
        tokenizer,
        eos_token_ids=configured_eos_ids(folder) + (() if own_eos is None else (own_eos,)),
        cleans_up=config.get("clean_up_tokenization_spaces") is True
        and cleans_up(tokenizer, for_bpe=config.get(CLEANS_UP_BPE) is True),
    )


def cleans_up(tokenizer: tokenizers.Tokenizer, *, for_bpe: bool) -> bool:
    """Whether transformers follows `clean_up_tokenization_spaces`: BPE tokens contain their spaces, so it ignores the
    flag for them unless it is forced to.
    """
    return for_bpe or not isinstance(tokenizer.model, tokenizers.models.BPE)
