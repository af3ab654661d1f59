"""Model folders with small tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.text.tiny_tokenizers import Save


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a model folder: tokenizer.json and the configurations given."""

    def write(tokenizer: Tokenizer, **configs: Any) -> Path:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in configs.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return write
