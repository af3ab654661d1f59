"""The sites of a model: layers, and parts of joined ones, that adapters change while a batch is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastserve.engine.layers.fusion import FusedGatedMLP
from fastserve.engine.layers.linear import Linear, TiedEmbedding, can_be_tied, embedding_scale
from fastserve.engine.layers.parallel import VocabParallelEmbedding
from fastserve.engine.loading.lora.targets import AdapterTargets


@dataclass(frozen=True, slots=True)
class Site:
    index: int
    path: str
    """The layer's path in transformers' model."""
    layer: torch.nn.Module
    """A Linear, or an embedding, whose inputs are tokens."""
    in_size: int
    out_size: int
    out_begin: int = 0
    """First of the site's outputs in the product of a joined layer."""
    scale: float = 1.0
    """Factor that the layer applies to its output."""
    is_head: bool = False
    """Whether its rows are those of the logits."""

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
    for path in targets.sizes:
        found = _find(model, path)
        if found is not None:
            layer, out_begin = found
            in_size, out_size = targets.part_sizes(path, rank)
            scale = 1.0 if isinstance(layer, Linear) else embedding_scale(layer)
            sites[path] = Site(len(sites), path, layer, in_size, out_size, out_begin, scale, path == targets.head)
    return sites


def _find(model: torch.nn.Module, path: str) -> tuple[torch.nn.Module, int] | None:
    parent_path, _, name = path.rpartition(".")
    if ".experts." in f".{path}.":
        return None  # its rows are those of the expert's tokens, not those of the batch
    parent = model.get_submodule(parent_path)
    if isinstance(parent, FusedGatedMLP) and name in ("gate_proj", "up_proj"):
        half: int = parent.parts[0].get().shape[0]
        return parent.gate_up, half if name == "up_proj" else 0
    module = getattr(parent, name, None)
    if isinstance(module, VocabParallelEmbedding):
        module = module.part
    is_layer = isinstance(module, Linear | TiedEmbedding) or (module is not None and can_be_tied(module))
    return (module, 0) if is_layer else None
