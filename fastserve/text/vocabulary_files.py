"""Vocabulary files of a folder without tokenizer.json, and the optional packages that read them."""

from __future__ import annotations

import base64
import binascii
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from fastserve.errors import StartupError

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Modules by which transformers reads these files, and the packages that have them."""
_TIKTOKEN = {"tiktoken": "tiktoken"}
_MAX_LINE_BYTES = 4096
_OTHERS = ("tekken.json", "vocab.json", "vocab.txt")


def check_packages(folder: Path) -> None:
    """Raises StartupError if reading the folder's tokenizer takes a package that is not installed."""
    for file in _files(folder):
        needed = _TIKTOKEN if is_tiktoken(file) else _SENTENCEPIECE
        missing = [package for module, package in needed.items() if not is_installed(module)]
        if missing:
            raise StartupError(
                f"{folder} has no tokenizer.json, and to read its {file.name} takes packages that are not installed "
                f"here: pip install {' '.join(missing)}."
            )


def _files(folder: Path) -> Iterator[Path]:
    if not any((folder / name).is_file() for name in _OTHERS):
        yield from (path for path in sorted(folder.glob("*.model")) if path.is_file())


def is_tiktoken(file: Path) -> bool:
    """Whether a vocabulary file is tiktoken's (lines of a token in base64 and its rank), not sentencepiece's."""
    with file.open("rb") as content:
        token, _, rank = content.readline(_MAX_LINE_BYTES).rstrip().partition(b" ")
    try:
        base64.b64decode(token, validate=True)
    except binascii.Error:
        return False
    return rank.isdigit()


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
