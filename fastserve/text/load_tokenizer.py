"""Which tokenizer reads a model folder."""

from __future__ import annotations

from pathlib import Path

from fastserve.text.fast_tokenizer import FastTokenizer
from fastserve.text.tokenizer import Tokenizer


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Raises StartupError when the folder has no tokenizer that can be read."""
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder)
    # Imports transformers, and torch with it: only where it is needed.
    from fastserve.text.slow_tokenizer import SlowTokenizer

    return SlowTokenizer(folder, trust_remote_code=trust_remote_code)
