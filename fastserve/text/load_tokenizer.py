"""Loads the tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path

from fastserve.text.fast_tokenizer import FastTokenizer
from fastserve.text.tokenizer import Tokenizer


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Raises StartupError if the folder has no readable tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder)
    # Only where needed: it imports transformers, which imports torch.
    from fastserve.text.slow_tokenizer import SlowTokenizer

    return SlowTokenizer(folder, trust_remote_code=trust_remote_code)
