"""The kinds of layers of a model, by what its layers are: their modules and settings.

Configurations name kinds in many ways (lists of types, intervals, numbers of first layers), so the built model is
looked at, before its layers are replaced.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from transformers import PreTrainedModel

_INDEX_NAMES = ("idx", "index", "layer_id", "layer_number")
"""Parts of the names of attributes that count layers."""


def layer_kinds(model: PreTrainedModel) -> list[Hashable]:
    """A value for each layer, equal for layers of one kind; no values when the layers are not in one list."""
    config = model.config.get_text_config(decoder=True)
    num_layers = config.num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers: torch.nn.ModuleList | list[torch.nn.Module] = next(
        (found for found in lists if len(found) == num_layers), []
    )
    types = getattr(config, "layer_types", None) or [None] * num_layers
    return [(_kind(layer), layer_type) for layer, layer_type in zip(layers, types, strict=False)]


def first_of_each_kind(kinds: Sequence[Hashable]) -> list[int]:
    """Indices of the first layer of each kind."""
    return [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]


def _kind(layer: torch.nn.Module) -> Hashable:
    return tuple((path, type(module).__name__, *_settings(module)) for path, module in layer.named_modules())


def _settings(module: torch.nn.Module) -> list[tuple[str, Hashable]]:
    return [
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and not any(part in name for part in _INDEX_NAMES)
    ]
