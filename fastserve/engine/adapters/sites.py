"""The sites of a model: layers, and parts of joined ones, that adapters change while a batch is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastserve.engine.adapters.routers import multiplies_with_weight
from fastserve.engine.layers.fusion import FusedGatedMLP
from fastserve.engine.layers.linear import Linear, TiedEmbedding, can_be_tied, embedding_scale
from fastserve.engine.layers.parallel import VocabParallelEmbedding
from fastserve.engine.loading.lora.targets import AdapterTargets, Kind


@dataclass(frozen=True, slots=True)
class Site:
    index: int
    """Place in the tables, the first one of experts."""
    path: str
    """The layer's path in transformers' model."""
    layer: torch.nn.Module
    """A Linear, an embedding, whose inputs are tokens, experts, or a router."""
    in_size: int
    out_size: int
    out_begin: int = 0
    """First of the site's outputs in the product of a joined layer."""
    scale: float = 1.0
    """Factor that the layer applies to its output."""
    kind: Kind = "linear"
    num_experts: int = 1
    """Experts with such a layer, those of other ranks included."""

    def weight_rows(self, begin: int, end: int) -> torch.Tensor:
        """Some rows of the weight of an embedding or LM head (tokens, hidden), on the host."""
        layer = self.layer
        if isinstance(layer, Linear):
            return layer.layout.part(slice(begin, end)).get().cpu()
        if isinstance(layer, TiedEmbedding):
            return layer.layout.rows(torch.arange(begin, end)).cpu()
        rows: torch.Tensor = layer.weight[begin:end]
        return rows.cpu()


def find_sites(model: torch.nn.Module, targets: AdapterTargets, rank: int) -> dict[str, Site]:
    """Sites of a rank by path, in the model's order, which is the same on all ranks."""
    sites: dict[str, Site] = {}
    index = 0
    for path in targets.sizes:
        found = _find(model, path, targets, rank)
        if found is not None:
            layer, out_begin = found
            in_size, out_size = targets.part_sizes(path, rank)
            kind = targets.kind(path)
            scale = embedding_scale(layer) if kind == "embedding" else 1.0
            count = targets.experts[path].count if kind == "experts" else 1
            sites[path] = Site(index, path, layer, in_size, out_size, out_begin, scale, kind, count)
            index += count
    return sites


def _find(model: torch.nn.Module, path: str, targets: AdapterTargets, rank: int) -> tuple[torch.nn.Module, int] | None:
    """The layer and the first of the site's outputs in its product."""
    parent_path, _, name = path.rpartition(".")
    kind = targets.kind(path)
    if kind == "experts":
        begin = targets.part_sizes(f"{parent_path}.gate_proj", rank)[1] if targets.experts[path].part == 1 else 0
        return model.get_submodule(parent_path), begin
    if ".experts." in f".{path}.":
        return None  # its rows are those of the expert's tokens, not those of the batch
    if kind == "router":
        router = model.get_submodule(path)
        return (router, 0) if multiplies_with_weight(router) else None
    parent = model.get_submodule(parent_path)
    if isinstance(parent, FusedGatedMLP) and name in ("gate_proj", "up_proj"):
        half: int = parent.parts[0].get().shape[0]
        return parent.gate_up, half if name == "up_proj" else 0
    module = getattr(parent, name, None)
    if isinstance(module, VocabParallelEmbedding):
        module = module.part
    is_layer = isinstance(module, Linear | TiedEmbedding) or (module is not None and can_be_tied(module))
    return (module, 0) if is_layer else None
