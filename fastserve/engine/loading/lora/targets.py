"""The layers of a model that adapters may change, noted before the model is assembled, which replaces modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.layers.linear import can_be_tied
from fastserve.engine.loading.lora.names import Names
from fastserve.engine.loading.sharding import Shard, Sharding
from fastserve.engine.loading.tensor_shards import take


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
        self._transposed: set[str] = set()
        for path, module in model.named_modules():
            if type(module) is torch.nn.Linear:
                self.sizes[path] = (module.in_features, module.out_features)
                self.head = path if module is head else self.head
            elif module is embedding and can_be_tied(module):
                self.sizes[path] = (module.num_embeddings, module.embedding_dim)
                self._transposed.add(path)
                self.embedding = path
            elif type(module) is Conv1D:
                self.sizes[path] = (module.weight.shape[0], module.weight.shape[1])
                self._transposed.add(path)

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
        sharding = self._shardings.get(f"{path}.weight")
        if sharding is None:
            return None
        shard = sharding.of(rank)
        return shard.transposed() if path in self._transposed else shard
