"""What the worker tells an engine process at its start."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from fastserve.config import EngineOptions, ServerConfig
from fastserve.options import same_option


class PackedCheckpoint(msgspec.Struct, frozen=True):
    """A quantized checkpoint that flags point to. What is None is read off its tensors."""

    method: str
    """gptq or awq"""
    path: str | None = None
    """A file or folder; None: the model's own folder."""
    bits: int | None = None
    group_size: int | None = None
    act_order: bool = False


class WeightOptions(msgspec.Struct, frozen=True):
    """Where the weights come from, and how they are kept."""

    quantize: str | None = None
    """int8 or nf4: how weights of linear layers are packed while they are read."""
    packed: PackedCheckpoint | None = None
    gguf_file: str | None = None
    adapter_dir: str | None = None
    """Of a LoRA adapter that is added to the weights."""
    dummy: bool = False
    """Random weights; no file of weights is looked for."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(EngineOptions):
    """Travels as JSON on the engine process's command line. Unset sizes are found from the model and free memory."""

    model_dir: str
    log_level: str = same_option(ServerConfig, "log_level")
    speculative_model_dir: str | None = None
    """Of a draft model, which then takes the place of the method."""
    weights: WeightOptions = field(default_factory=WeightOptions)

    @classmethod
    def of(cls, options: EngineOptions, **others: Any) -> EngineConfig:
        """`options` as they are, and what the worker has found: the fields of this class."""
        return cls(**{item.name: getattr(options, item.name) for item in fields(EngineOptions)}, **others)
