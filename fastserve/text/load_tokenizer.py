"""Loads the tokenizer of a model folder."""

from __future__ import annotations

import logging
from pathlib import Path

from fastserve.errors import StartupError
from fastserve.observability.text import printable
from fastserve.text.model_files import read_json
from fastserve.text.tokenizer import Tokenizer
from fastserve.text.tokenizer_classes import NeedsTransformers
from fastserve.text.tokenizer_file import read_tokenizer_file
from fastserve.text.vocabulary_files import check_packages

logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Raises StartupError if the folder has no readable tokenizer."""
    try:
        tokenizer = _load(folder, trust_remote_code=trust_remote_code)
        tokenizer.decode(tokenizer.encode("a \u4e16\U0001f600", add_special_tokens=True))
    except StartupError:
        raise
    except BaseException as error:
        # The library panics at some of what is wrong in a file, and a panic is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = printable(f"{type(error).__name__}: {error}", 300)
        raise StartupError(f"The tokenizer in {folder} cannot be used, since its parts do not fit: {cause}.") from error
    return tokenizer


def _load(folder: Path, *, trust_remote_code: bool) -> Tokenizer:
    has_code = trust_remote_code and "auto_map" in read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        try:
            return read_tokenizer_file(folder)
        except NeedsTransformers as error:
            logger.info("transformers reads the tokenizer of %s: %s", folder, error)
    elif not has_code:  # code knows itself what it needs
        check_packages(folder)
    # Only where needed: it imports transformers, which imports torch.
    from fastserve.text.slow_tokenizer import read_by_transformers

    return read_by_transformers(folder, trust_remote_code=trust_remote_code)
