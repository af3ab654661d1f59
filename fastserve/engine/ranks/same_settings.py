"""What must be the same on all machines of a model: versions, settings and the model itself. No torch here."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import msgspec

from fastserve.engine.settings import EngineConfig
from fastserve.observability.text import printable

_OWN = {
    *("model_dir", "log_level", "speculative_model_dir", "speculative_gguf_file", "weights", "gang"),
    *("profile_dir", "profile_steps", "debug"),
}
"""Settings that may differ: paths, and what concerns one process."""
_HASHED = ("config.json", "*.index.json", "quantize_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_LIBRARIES = ("fastserve", "torch", "transformers")
_MAX_HASHED_BYTES = 64 << 20


def same_settings(config: EngineConfig) -> dict[str, str]:
    """The settings by name, each as text. Raises OSError when a file of the model cannot be read."""
    found = {name: _version(name) for name in _LIBRARIES}
    for item in fields(config):
        if item.name not in _OWN:
            found[f"--{item.name.replace('_', '-')}"] = str(getattr(config, item.name))
    found["the way of quantization"] = str(config.weights.quantize)
    found["random weights"] = str(config.weights.dummy)
    if config.gang is not None:
        found["LOCAL_WORLD_SIZE"] = str(config.gang.local_size)
        found["the file of machines"] = msgspec.json.encode(config.gang.machines).decode()
    found["the model's files"] = _digest(Path(config.model_dir))
    return found


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """The first difference, worded to end a sentence; None if there is none."""
    for name in sorted(ours.keys() | theirs.keys()):
        if theirs.get(name) != ours.get(name):
            their, our = (printable(str(side.get(name)), 200) for side in (theirs, ours))
            return f"{name} is {their} there, and {our} on rank 0"
    return None


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _digest(folder: Path) -> str:
    """Digest of the configuration files' content, and of names and sizes of the weight files."""
    digest = hashlib.sha256()
    for path in _files(folder, _HASHED):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + file.read(_MAX_HASHED_BYTES) + b"\0")
    for path in _files(folder, _WEIGHTS):
        digest.update(f"{path.name} {path.stat().st_size}\0".encode())
    return digest.hexdigest()[:16]


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
