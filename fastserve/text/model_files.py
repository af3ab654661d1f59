"""Reads the JSON files of a model folder, and the tokens that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastserve.errors import StartupError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing. Raises StartupError if it is invalid."""
    value = _read(path, {})
    if not isinstance(value, dict):
        raise StartupError(f"{path} is not a JSON object.")
    return value


def read_json_list(path: Path) -> list[Any]:
    """Read a JSON array; [] if the file is missing. Raises StartupError if it is invalid."""
    value = _read(path, [])
    if not isinstance(value, list):
        raise StartupError(f"{path} is not a JSON array.")
    return value


def _read(path: Path, if_missing: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return if_missing
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{path} cannot be read: {error}.") from error


def token_text(value: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def configured_eos_ids(folder: Path) -> tuple[int, ...]:
    """EOS tokens of generation_config.json, or of config.json if it names none. A negative one stands for none."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = tuple(item for item in ids if type(item) is int and item >= 0)  # bool is an int in Python
        if found:
            return found
    return ()
