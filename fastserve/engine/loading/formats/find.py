"""Detects the format of a model's checkpoint and lists its weights."""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fastserve.engine.loading import formats
from fastserve.engine.loading.checkpoint import Tensors, open_file, open_folder
from fastserve.engine.loading.formats.dummy import dummy_sources
from fastserve.engine.loading.formats.source import Settings, Source, plain_source
from fastserve.engine.settings import PackedCheckpoint, WeightOptions
from fastserve.errors import StartupError
from fastserve.gguf.file import find_gguf

logger = logging.getLogger(__name__)

_NO_METHODS = ("dummy", "find", "gguf", "source")
_SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
"""Files in which AutoGPTQ and AutoAWQ wrote the settings that are in config.json today."""


def methods() -> list[str]:
    """Names of the supported quantization methods."""
    names = (item.name for item in pkgutil.iter_modules(formats.__path__))
    return sorted(name.replace("_", "-") for name in names if name not in _NO_METHODS)


def find_sources(
    model: PreTrainedModel, folder: Path, settings: Settings | None, options: WeightOptions
) -> list[Source]:
    """All weights stored for `model`. `settings`: the `quantization_config` of its config.json.

    Raises StartupError with the reason when they cannot be read, or when flags contradict the checkpoint.
    """
    if options.dummy:
        if settings is not None:
            logger.warning(
                "--dummy: config.json says that the weights are quantized (%s); random ones are not, so they take more "
                "memory. --load-8bit and --load-4bit keep them in 8 and 4 bits.",
                _method(settings),
            )
        return dummy_sources(model)
    packed = options.packed
    gguf = _gguf_file(folder, options)
    if gguf is not None:
        from fastserve.engine.loading.formats.gguf import gguf_sources

        if packed is not None:
            raise StartupError(
                f"{_flag(packed)} excludes the GGUF file {gguf}: leave the {packed.method} flags out, or give the "
                "folder of the base model."
            )
        return gguf_sources(model, gguf)
    settings = _settings_of(packed, folder, settings)
    if packed is None and settings is None:
        return [plain_source(tensor) for tensor in open_folder(folder).values()]
    if options.quantize is not None:
        flag = {"int8": "--load-8bit", "nf4": "--load-4bit"}[options.quantize]
        method = packed.method if packed is not None else _method(settings or {})
        raise StartupError(f"{flag}: the checkpoint is quantized already ({method}); leave the flag out.")
    if packed is None:
        assert settings is not None
        return _by_method(open_folder(folder), settings, PackedCheckpoint(_method(settings)))
    return _by_method(_packed_tensors(folder, packed), settings or {}, packed)


def stored_format_of(folder: Path, settings: Settings | None, options: WeightOptions) -> str | None:
    """The quantization method of the checkpoint that `find_sources` reads, or "gguf"; None: it is not quantized."""
    if _gguf_file(folder, options) is not None:
        return "gguf"
    settings = _settings_of(options.packed, folder, settings)
    if options.packed is not None:
        return options.packed.method
    return None if settings is None else _method(settings)


def _flag(packed: PackedCheckpoint) -> str:
    return f"--{packed.method}-wbits" if packed.path is None else f"--{packed.method}-ckpt {packed.path}"


def _settings_of(packed: PackedCheckpoint | None, folder: Path, own: Settings | None) -> Settings | None:
    """Quantization settings from the folder of the packed weights, which may differ from the model's folder; `own`: the
    model's settings. Raises StartupError when the settings and the flags name different methods."""
    if packed is None:
        return own or stored_settings(folder)
    found = stored_settings(folder if packed.path is None else Path(packed.path).expanduser())
    if found is None:
        return own if own is not None and _method(own) == packed.method else None
    if _method(found) != packed.method:
        remedy = f"leave the {packed.method} flags out"
        raise StartupError(
            f"{_flag(packed)}: the settings beside these weights say that they are quantized by {_method(found)}; "
            f"{remedy if packed.path is None else remedy + ' and give that folder as the model'}."
        )
    return found


def _method(settings: Settings) -> str:
    return str(settings.get("quant_method") or settings.get("method") or ("awq" if "w_bit" in settings else "gptq"))


def _by_method(tensors: Tensors, settings: Settings, stated: PackedCheckpoint) -> list[Source]:
    method = stated.method
    if method not in methods():
        raise StartupError(
            f"The checkpoint is quantized by {method}, which is not served; served are {', '.join(methods())}, or the "
            "model's unquantized checkpoint, with --load-8bit or --load-4bit."
        )
    module: Any = importlib.import_module(f"{formats.__name__}.{method.replace('-', '_')}")
    found: list[Source] = module.sources(tensors, settings, stated)
    return found


def _gguf_file(folder: Path, options: WeightOptions) -> Path | None:
    if options.gguf_file is not None:
        return Path(options.gguf_file)
    if options.packed is not None or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return None
    return find_gguf(folder)


def _packed_tensors(folder: Path, packed: PackedCheckpoint) -> Tensors:
    """Tensors of the packed file, and those of the base model that it does not replace."""
    path = folder if packed.path is None else Path(packed.path).expanduser()
    if not path.exists():
        raise StartupError(f"--{packed.method}-ckpt {packed.path}: there is no such file or folder.")
    own = open_folder(path) if path.is_dir() else open_file(path)
    if path.is_dir() and path.resolve() == folder.resolve():
        return own
    replaced = {f"{name.removesuffix('.qweight')}.weight" for name in own if name.endswith(".qweight")}
    base = open_folder(folder) if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) else {}
    return {**{name: tensor for name, tensor in base.items() if name not in replaced}, **own}


def stored_settings(path: Path) -> dict[str, Any] | None:
    """Quantization settings stored in a folder, or in that of a file; None if there are none."""
    folder = path if path.is_dir() else path.parent
    config = _read_settings(folder / "config.json").get("quantization_config")
    if isinstance(config, dict):
        return config
    return next((found for name in _SETTINGS_FILES if (found := _read_settings(folder / name))), None)


def _read_settings(file: Path) -> dict[str, Any]:
    """{} when there is no such file."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{file} cannot be read: {error}.") from error
    if not isinstance(settings, dict):
        raise StartupError(f"{file} cannot be read: it is no JSON object.")
    return settings
