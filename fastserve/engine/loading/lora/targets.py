"""The layers of a model that adapters may change, noted before the model is assembled, which replaces modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.layers.experts import WEIGHTS, are_experts
from fastserve.engine.layers.linear import can_be_tied
from fastserve.engine.loading.lora.names import Names
from fastserve.engine.loading.sharding import Shard, Sharding
from fastserve.engine.loading.tensor_shards import take

Kind: TypeAlias = Literal["linear", "head", "embedding", "experts", "router"]
"""A head's rows are those of the logits, those of experts the pairs of token and expert."""


@dataclass(frozen=True, slots=True)
class ExpertsTarget:
    """A weight of all experts of a layer, or the part of each expert's weight that is a layer in the checkpoint."""

    module: str
    """Path of the experts module."""
    name: str
    """Name of the weight in it."""
    count: int
    is_transposed: bool
    """The weight is (experts, in, out)."""
    part: int | None = None
    """Which of the two parts of the outputs; None: all."""


class AdapterTargets:
    """Sizes are those of the whole model; `rank` asks for the part that one of its ranks holds."""

    def __init__(self, model: PreTrainedModel, shardings: Mapping[str, Sharding], num_ranks: int) -> None:
        """`model`: whole, with the modules that transformers makes; weights may be on the meta device. `shardings`: of
        its weights by name, where ranks have parts of them."""
        self.names = Names(model)
        self.num_ranks = num_ranks
        self._shardings = shardings
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.sizes: dict[str, tuple[int, int]] = {}
        """(inputs, outputs) of each linear layer by path; an embedding's inputs are the tokens."""
        self.embedding: str | None = None
        self.head: str | None = None
        """Paths of the embedding of the tokens and of the LM head."""
        self.routers: set[str] = set()
        """Paths of modules with a weight that is no linear layer's: they choose experts."""
        self.experts: dict[str, ExpertsTarget] = {}
        """By path; `sizes` has those of one expert."""
        self._transposed: set[str] = set()
        for path, module in model.named_modules():
            if type(module) is torch.nn.Linear:
                self.sizes[path] = (module.in_features, module.out_features)
                self.head = path if module is head else self.head
            elif module is embedding and can_be_tied(module):
                self.sizes[path] = (module.num_embeddings, module.embedding_dim)
                self._transposed.add(path)
                self.embedding = path
            elif are_experts(module):
                self._add_experts(path, module)
                self._add_routers(model, path.rpartition(".")[0], module.num_experts)
            elif type(module) is Conv1D:
                self.sizes[path] = (module.weight.shape[0], module.weight.shape[1])
                self._transposed.add(path)

    def _add_experts(self, path: str, module: torch.nn.Module) -> None:
        weights = {name: parameter for name, parameter in module.named_parameters(recurse=False) if name in WEIGHTS}
        for name, weight in weights.items():
            if weight.dim() != 3:
                continue
            is_transposed = bool(module.is_transposed)
            size = tuple(weight.shape[1:])
            in_size, out_size = size if is_transposed else size[::-1]
            names: dict[str, int | None] = {name: None}
            if name == "gate_up_proj" and getattr(module, "is_concatenated", True):
                names |= {"gate_proj": 0, "up_proj": 1}
            for own_name, part in names.items():
                own = f"{path}.{own_name}"
                self.sizes[own] = (in_size, out_size if part is None else out_size // 2)
                self.experts[own] = ExpertsTarget(path, name, weight.shape[0], is_transposed, part)

    def _add_routers(self, model: torch.nn.Module, path: str, num_experts: int) -> None:
        """Modules beside the experts that multiply with a weight of their own."""
        for name, module in model.get_submodule(path).named_children():
            weight = module._parameters.get("weight")
            if type(module) is torch.nn.Linear or weight is None or weight.dim() != 2:
                continue
            if weight.shape[0] == num_experts:
                self.sizes[f"{path}.{name}"] = (weight.shape[1], num_experts)
                self.routers.add(f"{path}.{name}")

    def own_experts(self, path: str, rank: int) -> range:
        """The experts of a weight of experts that a rank has, whole or in part."""
        target = self.experts[path]
        sharding = self._shardings.get(f"{target.module}.{target.name}")
        if sharding is None or sharding.dim:
            return range(target.count)
        return range(*sharding.of(rank).ranges[0])

    def kind(self, path: str) -> Kind:
        if path in self.experts:
            return "experts"
        if path in self.routers:
            return "router"
        return "embedding" if path == self.embedding else "head" if path == self.head else "linear"

    def is_transposed(self, path: str) -> bool:
        """Whether the model has the weight as (in, out)."""
        return path in self._transposed

    def rows(self, path: str, rank: int) -> tuple[int, int]:
        """The first row, and one after the last, of the embedding's or LM head's weight (tokens, hidden) that a rank
        has."""
        sharding = self._shardings.get(f"{path}.weight")
        if sharding is None:
            in_size, out_size = self.sizes[path]
            return 0, in_size if path == self.embedding else out_size
        return sharding.of(rank).ranges[0]

    def part_sizes(self, path: str, rank: int) -> tuple[int, int]:
        """(inputs, outputs) of a layer that a rank has."""
        in_size, out_size = self.sizes[path]
        shard = self._shard(path, rank)
        if shard is None:
            return in_size, out_size
        return (in_size, shard.size) if shard.dim == 0 else (shard.size, out_size)

    def is_whole(self, path: str) -> bool:
        """Whether each rank has all of a layer, or of each of its experts."""
        return self._shard(path, 0) is None

    def part(self, path: str, rank: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's part of `a` (rank, in) and `b` (out, rank): where it has some outputs of the layer, all of A and
        these rows of B; where it has some inputs, these columns of A and all of B, and the products are summed with
        those of the layer."""
        shard = self._shard(path, rank)
        if shard is None:
            return a, b
        if shard.dim == 0:
            return a, take(Shard((shard.whole[0], b.shape[1]), 0, shard.ranges), b)
        return take(Shard((a.shape[0], shard.whole[1]), 1, shard.ranges), a), b

    def _shard(self, path: str, rank: int) -> Shard | None:
        """Of the weight (out, in)."""
        target = self.experts.get(path)
        if target is not None:
            sharding = self._shardings.get(f"{target.module}.{target.name}")
            if sharding is None or sharding.dim == 0:
                return None
            shard = sharding.of(rank).without_first_dim()
            shard = shard.transposed() if target.is_transposed else shard
            return shard if target.part is None else shard.piece(0, target.part, 2)
        sharding = self._shardings.get(f"{path}.weight")
        if sharding is None:
            return None
        shard = sharding.of(rank)
        return shard.transposed() if path in self._transposed else shard
