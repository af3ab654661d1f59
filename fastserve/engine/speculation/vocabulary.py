"""Checks that a draft model has the same vocabulary as the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastserve.errors import StartupError

_FILLER = re.compile(r"\[(PAD|UNUSED_)\d+.*\]", re.DOTALL)
"""Texts of ids without a token, with which GGUF files fill their lists."""


def require_same_vocabulary(model_dir: str, draft_dir: str, vocab_size: int, draft_vocab_size: int) -> None:
    """Raise StartupError when a draft model's token ids mean other tokens.

    `vocab_size` and `draft_vocab_size` are those of the embeddings, which models of one family pad differently: they
    are compared only where there are no tokenizers.
    """
    model, draft = _tokens(model_dir), _tokens(draft_dir)
    if model is None and draft is None:
        same = vocab_size == draft_vocab_size
        difference = f"{draft_vocab_size} tokens, and the model has {vocab_size}"
    else:
        same = model == draft
        difference = "a tokenizer with other tokens than the model's"
    if not same:
        raise StartupError(
            f"--speculative-model {draft_dir} has {difference}: give a model with the same vocabulary, such as a "
            "smaller one of the same family, or leave --speculative-model out."
        )


def _tokens(folder: str) -> Any:
    """The comparable part of a tokenizer; None when the folder has none."""
    path = Path(folder) / "tokenizer.json"
    if path.is_file():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        added = {item["content"]: item["id"] for item in tokenizer.get("added_tokens") or []}
        vocabulary = tokenizer["model"].get("vocab")
        if not isinstance(vocabulary, dict):
            return vocabulary, added
        # GGUF files have added tokens among the others.
        return {text: index for text, index in (vocabulary | added).items() if not _FILLER.fullmatch(text)}
    for name in ("tokenizer.model", "vocab.json", "vocab.txt"):
        path = Path(folder) / name
        if path.is_file():
            return path.read_bytes()
    return None
