"""LoRA adapters as PEFT writes them, merged into the weights of the base model while these are read (Hu et al., 2021):
W + scale * B A. Does not need PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.loading.checkpoint import StoredTensor, Tensors, open_file
from fastserve.engine.loading.formats.source import QuantizedTensor, Source, Value, source_of
from fastserve.errors import StartupError

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A|B)(?:\.default)?\.weight")
_WHOLE = re.compile(r"(?P<layer>.+?)(?:\.modules_to_save(?:\.default)?)?\.(?P<leaf>weight|bias)")


@dataclass(frozen=True, slots=True)
class _LoraDelta:
    a: StoredTensor
    """(rank, in)"""
    b: StoredTensor
    """(out, rank)"""
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> torch.Tensor:
        """(out, in)"""
        return (self.b.read().float() @ self.a.read().float()) * self.scale


def merged(sources: Iterable[Source], model: PreTrainedModel, folder: Path) -> list[Source]:
    """`sources` with the adapter merged into them. Raises StartupError for adapters other than LoRA."""
    settings = _read_settings(folder)
    deltas, replaced = _read_adapter(folder, settings)
    transposed = {f"{path}.weight" for path, module in model.named_modules() if type(module) is Conv1D}
    prefix = f"{model.base_model_prefix}."
    found = []
    for source in sources:
        # The checkpoint's names may lack the model's prefix, which the adapter's names have.
        names = {source.name, prefix + source.name}
        key = next((name for name in names if name in deltas), None)
        whole = next((name for name in names if name in replaced), None)
        if whole is not None:
            source = source_of(source.name, [replaced.pop(whole)], lambda value: value)
        elif key is not None:
            source = _with_delta(source, deltas.pop(key), transposed=key in transposed)
        found.append(source)
    left = [*deltas, *replaced]
    if left:
        raise StartupError(
            f"The adapter in {folder} changes {left[0]} ({len(left)} such in all), which its base model does not have."
        )
    return found


def _with_delta(source: Source, delta: _LoraDelta, *, transposed: bool) -> Source:
    def make(*stored: torch.Tensor) -> Value:
        weight = source.make(*stored)
        if isinstance(weight, QuantizedTensor):
            raise StartupError(
                f"{source.location}: an adapter cannot be added to {source.name}, which is quantized; use the "
                "unquantized base model, with --load-8bit or --load-4bit where memory is short."
            )
        shape = tuple(weight.t().shape) if transposed else tuple(weight.shape)
        if shape != delta.shape:
            raise StartupError(
                f"{delta.a.file}: {delta.a.name} and {delta.b.name} change a weight of shape {delta.shape}, and "
                f"{source.name} of the base model has the shape {shape}: the adapter is of another model."
            )
        change = delta.dense()
        return (weight.float() + (change.t() if transposed else change)).to(weight.dtype)

    return Source(source.name, source.stored, make, source.num_bytes)


def _read_settings(folder: Path) -> Mapping[str, Any]:
    file = folder / "adapter_config.json"
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
        int(settings["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{file} cannot be read as the settings of a LoRA adapter: {error!r}") from error
    kind = str(settings.get("peft_type", "LORA"))
    unknown = "DoRA" if settings.get("use_dora") else None if kind == "LORA" else kind
    if unknown is not None:
        raise StartupError(
            f"The adapter in {folder} is of the kind {unknown}; only LoRA is merged at start. Merge it with PEFT's "
            "merge_and_unload, save the model, and serve that."
        )
    return settings


def _read_adapter(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, _LoraDelta], dict[str, StoredTensor]]:
    """Low-rank deltas, and weights that the adapter replaces entirely, by the base model's names."""
    tensors = _adapter_tensors(folder)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    replaced = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(_PREFIX)
        part, whole = _PART.fullmatch(short), _WHOLE.fullmatch(short)
        if part is not None:
            pairs.setdefault(part["layer"], {})[part["part"]] = tensor
        elif whole is not None and ".lora_" not in short:
            replaced[f"{whole['layer']}.{whole['leaf']}"] = tensor
        else:
            raise StartupError(
                f"{tensor.file}: {name} is no part of a LoRA adapter that can be merged here. Merge it with "
                "PEFT's merge_and_unload, save the model, and serve that."
            )
    deltas = {}
    for layer, parts in pairs.items():
        if parts.keys() != {"A", "B"}:
            file = next(iter(parts.values())).file
            raise StartupError(f"{file}: {layer} has only one of lora_A and lora_B. Save the adapter again.")
        deltas[f"{layer}.weight"] = _LoraDelta(parts["A"], parts["B"], _scale(layer, parts["A"].shape[0], settings))
    return deltas, replaced


def _adapter_tensors(folder: Path) -> Tensors:
    files = [folder / f"adapter_model{suffix}" for suffix in (".safetensors", ".bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise StartupError(f"{folder} has an adapter_config.json, but no adapter_model.safetensors. Download it again.")
    return open_file(file)


def _scale(layer: str, rank: int, settings: Mapping[str, Any]) -> float:
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    own = (value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?{pattern}", layer))
    alpha = float(next(own, settings.get("lora_alpha", rank)))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
