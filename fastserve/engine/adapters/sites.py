"""The sites of a model: linear layers, and parts of joined ones, that adapters change while a batch is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastserve.engine.layers.fusion import FusedGatedMLP
from fastserve.engine.layers.linear import Linear
from fastserve.engine.loading.lora.targets import AdapterTargets


@dataclass(frozen=True, slots=True)
class Site:
    index: int
    path: str
    """The layer's path in transformers' model."""
    linear: Linear
    in_size: int
    out_size: int
    out_begin: int = 0
    """First of the site's outputs in the product of a joined layer."""


def find_sites(model: torch.nn.Module, targets: AdapterTargets) -> dict[str, Site]:
    """Sites by path, in the model's order."""
    sites: dict[str, Site] = {}
    for path, (in_size, out_size) in targets.sizes.items():
        found = _find(model, path)
        if found is not None:
            linear, out_begin = found
            sites[path] = Site(len(sites), path, linear, in_size, out_size, out_begin)
    return sites


def _find(model: torch.nn.Module, path: str) -> tuple[Linear, int] | None:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if isinstance(parent, FusedGatedMLP) and name in ("gate_proj", "up_proj"):
        half: int = parent.parts[0].get().shape[0]
        return parent.gate_up, half if name == "up_proj" else 0
    module = getattr(parent, name, None)
    return (module, 0) if isinstance(module, Linear) else None
