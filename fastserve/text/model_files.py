"""JSON files of a model folder, and what they say of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastserve.errors import StartupError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; {} when the file is missing. Raises StartupError when it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} is not a JSON object.")
    return value


def token_text(value: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def configured_eos_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens of generation_config.json, or of config.json where that names none."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(item for item in value if isinstance(item, int))
    return ()
