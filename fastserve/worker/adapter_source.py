"""Finds the adapters that the worker's flags name: folders, Hugging Face ids, and those of the demo model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fastserve.config import LoraOptions, is_hub_id
from fastserve.demo import ADAPTER_NAMES, demo_adapter_path
from fastserve.errors import FastserveError, InvalidRequestError, StartupError
from fastserve.observability.text import printable
from fastserve.protocol import MAX_ADAPTER_NAME_CHARS, AdapterName
from fastserve.worker.model_source import default_name, find_on_hub

CONFIG_FILE = "adapter_config.json"
MAX_PATH_CHARS = 4096
_NAME: TypeAdapter[str] = TypeAdapter(AdapterName)
_JSON_FIELDS = {"name", "path", "base_model_name"}
_COPY_SUFFIX = re.compile(r"-[0-9]+$")


@dataclass(frozen=True)
class Adapter:
    name: str
    source: str
    """Its path or repository id as given."""
    path: str
    """Its folder."""


def name_problem(name: str) -> str | None:
    """The reason why an adapter cannot have this name, or None."""
    try:
        _NAME.validate_python(name)
    except ValidationError:
        return (
            f"The adapter name '{printable(name, 80)}' is invalid: give 1 to {MAX_ADAPTER_NAME_CHARS} printable "
            "characters without a colon."
        )
    return None


def find_adapters(options: LoraOptions, model_names: Sequence[str]) -> tuple[Adapter, ...]:
    """The adapters of --lora-modules and --lora-dirs. Raises StartupError for one that cannot be found, and for names
    that are invalid, given twice, or the model's.
    """
    found: dict[str, Adapter] = {}
    for flag, name, source in _given(options, model_names):
        problem = name_problem(name)
        if problem is not None:
            raise StartupError(f"{flag}: {problem}")
        if name in model_names:
            raise StartupError(f"{flag}: '{printable(name)}' is the name of the model; give the adapter another one.")
        path = _folder(source, flag, may_be_copy=flag == "--lora-dirs")
        if name in found:
            raise StartupError(f"{flag}: the name '{printable(name)}' is given twice; give each adapter its own.")
        found[name] = Adapter(name, source, str(path))
    return tuple(found.values())


def find_root(options: LoraOptions) -> Path | None:
    """The folder of --lora-root. Raises StartupError if there is none."""
    if options.lora_root is None:
        return None
    root = Path(options.lora_root).expanduser()
    if not root.is_dir():
        raise StartupError(f"--lora-root {printable(options.lora_root)}: there is no such folder.")
    return root.absolute()


def find_adapter_folder(source: str) -> Path:
    """The folder of an adapter given by path, repository id or demo name. Raises InvalidRequestError."""
    try:
        return _folder(source, "lora_path", may_be_copy=False)
    except FastserveError as error:
        raise InvalidRequestError(error.message, param="lora_path") from error


def _given(options: LoraOptions, model_names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Flag, name and path of each adapter."""
    for text in options.lora_modules:
        if text.lstrip().startswith("{"):
            for name, path in _from_json(text, model_names):
                yield "--lora-modules", name, path
            continue
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise StartupError(f"--lora-modules {printable(text)}: an adapter has the form NAME=PATH.")
        yield "--lora-modules", name, path
    for text in options.lora_dirs:
        name, equals, path = text.partition("=")
        yield ("--lora-dirs", name, path) if equals else ("--lora-dirs", default_name(text), text)


def _from_json(text: str, model_names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """An adapter as vLLM writes it (name, path), or an object of paths by name."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StartupError(f"--lora-modules {printable(text)}: this is not valid JSON.") from error
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values() if value):
        raise StartupError(f"--lora-modules {printable(text)}: give names and paths as strings.")
    if not {"name", "path"} <= fields.keys() <= _JSON_FIELDS:
        yield from fields.items()
        return
    base = fields.get("base_model_name")
    if base and base not in model_names:
        raise StartupError(
            f"--lora-modules: the adapter '{printable(fields['name'])}' is for the model '{printable(base)}', and this "
            f"worker serves {printable(', '.join(model_names))}."
        )
    yield fields["name"], fields["path"]


def _folder(source: str, flag: str, *, may_be_copy: bool) -> Path:
    if not source or len(source) > MAX_PATH_CHARS or "\0" in source:
        raise StartupError(f"{flag} {printable(source)}: give the folder of an adapter.")
    if source in ADAPTER_NAMES and not Path(source).is_dir():
        return Path(demo_adapter_path(source))
    folder = Path(source).expanduser()
    if may_be_copy and not folder.exists() and _COPY_SUFFIX.search(source):
        original = Path(_COPY_SUFFIX.sub("", source)).expanduser()
        if original.is_dir():
            folder = original
    if not folder.exists() and is_hub_id(source):
        folder = find_on_hub(source, flag)
    if not folder.is_dir():
        raise StartupError(f"{flag} {printable(source)}: there is no such folder.")
    if not (folder / CONFIG_FILE).is_file():
        raise StartupError(f"{flag} {printable(source)}: the folder has no {CONFIG_FILE}, so it is not an adapter.")
    return folder.absolute()
