"""Where a model's folder is: the bundled demo, a local folder, or the Hugging Face hub (its cache first)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from fastserve.demo import demo_model_path
from fastserve.errors import StartupError
from fastserve.text.tokenizer import read_json

logger = logging.getLogger(__name__)

DEMO_MODEL = "fastserve-demo"
_REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Other frameworks' weights, and checkpoints in the makers' own form.
_NOT_NEEDED = ["original/*", "*.pth", "*.pt", "*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.tflite", "onnx/*", "coreml/*"]


def default_name(model_path: str) -> str:
    """The last component of a path or repository id, in Windows's form too."""
    return re.split(r"[/\\]", model_path.rstrip("/\\"))[-1] or model_path


def resolve_model(model_path: str, revision: str, *, flag: str = "--model-path") -> Path:
    """The folder of a model, which `flag` names. Raises StartupError that says why there is none."""
    if model_path == DEMO_MODEL and not Path(model_path).is_dir():
        return Path(demo_model_path())
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise StartupError(f"{flag} {model_path}: the folder has no config.json, so it is not a model.")
        return folder
    if folder.exists():
        raise StartupError(f"{flag} {model_path}: this is a file; give the model's folder.")
    if not _REPOSITORY_ID.fullmatch(model_path):
        raise StartupError(f"{flag} {model_path}: there is no such folder.")
    return _from_hub(model_path, revision, flag)


def _from_hub(repository: str, revision: str, flag: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _download(repository, revision, cached_only=True)
    except (LocalEntryNotFoundError, FileNotFoundError):
        logger.info("downloading %s (revision %s) from the Hugging Face hub", repository, revision)
    try:
        return _download(repository, revision, cached_only=False)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise StartupError(
            f"{flag} {repository}: there is no such folder, and the Hugging Face hub did not give a model of "
            f"that name (revision {revision}): {cause}"
        ) from error


def _download(repository: str, revision: str, *, cached_only: bool) -> Path:
    """Fetch (or find) everything but weights, then safetensors, or where there are none the older .bin files."""
    folder = _snapshot(repository, revision, ["*.bin", *_NOT_NEEDED], cached_only=cached_only)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(repository, revision, _NOT_NEEDED, cached_only=cached_only)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{repository} has no config.json")
    missing = _missing_weights(folder)
    if missing is not None:
        raise FileNotFoundError(f"{repository} has no {missing}")
    return folder


def _missing_weights(folder: Path) -> str | None:
    """What a model's folder lacks, as a download that was interrupted leaves it; None when all is there."""
    for suffix in (".safetensors", ".bin"):
        # An index stands for its shards, unless the whole is there in one file.
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
