"""One rank's part of a model: what it keeps of each weight, and the layers that exchange the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from fastserve.engine.layers.experts import Experts
from fastserve.engine.layers.layouts.layout import Memo, WeightLayout
from fastserve.engine.layers.linear import Linear
from fastserve.engine.layers.modules import replace_module
from fastserve.engine.layers.parallel import (
    ParallelRMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from fastserve.engine.loading.partition_plan import AttentionPlan, PartitionPlan, plan_partition
from fastserve.engine.loading.sharding import Shard, Sharding
from fastserve.engine.loading.tensor_shards import join, take
from fastserve.engine.loading.weight_table import WeightSlot
from fastserve.engine.ranks.collectives import SINGLE_RANK, Collectives

_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("split_size", "q_size")
"""Attributes of attention modules and configurations in transformers' models that follow from the number of heads."""


class Partition:
    """The part of a model that one rank holds."""

    def __init__(self, plan: PartitionPlan, collectives: Collectives) -> None:
        self.plan = plan
        self.collectives = collectives
        self.shards: Mapping[str, Shard] = {
            name: sharding.of(collectives.rank) for name, sharding in plan.weights.items()
        }
        """By name, for weights of which the rank has a part."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        collectives: Collectives,
        *,
        expert_parallel: bool = False,
        undivided: Collection[str] = (),
    ) -> Partition:
        """`undivided`: classes of attention modules to leave whole. Raises StartupError when the model cannot be
        divided over the ranks."""
        if collectives.size == 1:
            return WHOLE
        plan = plan_partition(model, collectives.size, expert_parallel=expert_parallel, undivided=undivided)
        return cls(plan, collectives)

    @property
    def own_experts(self) -> str | None:
        """Which experts the rank has, for a log; None where they are not given out whole."""
        layers = Counter((ranges[self.collectives.rank], ranges[-1][1]) for ranges in self.plan.whole_experts.values())
        parts = [
            f"experts {begin} to {end - 1} of {count} in {layers[(begin, end), count]} layers"
            for (begin, end), count in layers
        ]
        return ", ".join(parts) or None

    def divide(self, model: PreTrainedModel) -> None:
        """Reduce a model, whose weights may be on the meta device, to the rank's part. Its linear layers and embedding
        are replaced later, with those of `linear` and `place_embedding`."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        parts: dict[int, torch.nn.Parameter] = {}
        for name, shard in self.shards.items():
            path, _, leaf = name.rpartition(".")
            whole = parameters[name]
            if id(whole) not in parts:
                parts[id(whole)] = torch.nn.Parameter(take(shard, whole.data), requires_grad=False)
            model.get_submodule(path)._parameters[leaf] = parts[id(whole)]
        if self.plan.embedding is not None:
            model.get_submodule(self.plan.embedding).padding_idx = None  # it may be in another rank's part
        for path, attention in self.plan.attention.items():
            self._divide_attention(model.get_submodule(path), attention)
        rank = self.collectives.rank
        for path, counts in self.plan.norms.items():
            width = self.plan.weights[f"{path}.weight"].whole[0]
            norm = model.get_submodule(path)
            replace_module(model, path, ParallelRMSNorm(norm, width, self.collectives, counts=counts[rank]))

    def _divide_attention(self, module: torch.nn.Module, attention: AttentionPlan) -> None:
        rank, heads = self.collectives.rank, attention.heads
        (begin, end), (kv_begin, kv_end) = attention.ranges.query[rank], attention.ranges.kv[rank]
        query, kv = end - begin, kv_end - kv_begin
        changed = dict.fromkeys(_KV_HEADS, (heads.kv, kv)) | dict.fromkeys(_HEADS, (heads.query, query))
        widths = dict.fromkeys(_WIDTHS, (heads.query * heads.dim, query * heads.dim))
        groups = {"num_key_value_groups": (heads.query // heads.kv, query // kv)}
        for name, (whole, part) in (changed | widths | groups).items():
            if getattr(module, name, None) == whole:
                setattr(module, name, part)
        if hasattr(module, "config"):
            numbers = {
                name: part for name, (whole, part) in changed.items() if getattr(module.config, name, 0) == whole
            }
            module.config = _ConfigOfRank(module.config, numbers)

    # ---- layers -------------------------------------------------------------------------------------------------

    def linear(self, path: str, layout: WeightLayout, bias: torch.Tensor | None) -> Linear:
        """The linear layer at `path` with the rank's part of its weight."""
        if path in self.plan.row_parallel:
            return RowParallelLinear(layout, bias, self.collectives)
        if path == self.plan.head:
            return VocabParallelHead(layout, bias, self.collectives)
        return Linear(layout, bias)

    def experts(self, path: str, original: torch.nn.Module) -> Experts:
        """The module in the place of the experts at `path`, of which the rank has its part."""
        ranges = self.plan.whole_experts.get(path)
        return Experts(original, self.collectives, None if ranges is None else range(*ranges[self.collectives.rank]))

    def is_partial_sum(self, weight: str) -> bool:
        """Whether the rank has some inputs of a linear layer or of experts."""
        path, _, leaf = weight.rpartition(".")
        return path in self.plan.row_parallel or (path in self.plan.experts and leaf == "down_proj")

    def place_embedding(self, model: PreTrainedModel) -> None:
        """Replace the embedding, once it has its weight."""
        path = self.plan.embedding
        if path is None:
            return
        [(begin, end)] = self.shards[f"{path}.weight"].ranges
        embedding = model.get_submodule(path)
        replace_module(model, path, VocabParallelEmbedding(embedding, begin, end - begin, self.collectives))

    # ---- whole weights ------------------------------------------------------------------------------------------

    def slot(self, name: str, slot: WeightSlot) -> WeightSlot:
        """Access to the whole weight, of which `slot` holds the rank's part: all ranks must get or set it together."""
        sharding = self.plan.weights.get(name)
        if sharding is None:
            return slot
        return _DividedSlot(slot, sharding, self.shards[name], self.collectives)

    def whole_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """Shape of the whole weight; `shape`: that of the rank's part."""
        return torch.Size(self.plan.weights[name].whole) if name in self.plan.weights else shape


WHOLE = Partition(PartitionPlan(1), SINGLE_RANK)
"""The partition of a model that one rank holds whole."""


class _DividedSlot:
    """A whole weight, of which `slot` holds the rank's part."""

    def __init__(self, slot: WeightSlot, sharding: Sharding, shard: Shard, collectives: Collectives) -> None:
        self._slot = slot
        self._sharding = sharding
        self._shard = shard
        self._collectives = collectives

    def get(self) -> torch.Tensor:
        return join(self._sharding, self._collectives.all_gather(self._slot.get(), self._sharding.dim))

    def set(self, weight: torch.Tensor) -> None:
        self._slot.set(take(self._shard, weight))

    def copied(self, memo: Memo) -> _DividedSlot:
        return _DividedSlot(self._slot.copied(memo), self._sharding, self._shard, self._collectives)

    def take_over(self, other: _DividedSlot) -> None:
        self._slot.take_over(other._slot)

    def tensors(self) -> Sequence[torch.Tensor]:
        return self._slot.tensors()


class _ConfigOfRank:
    """A model's configuration with the numbers of heads that one rank has."""

    def __init__(self, config: Any, numbers: Mapping[str, int]) -> None:
        self._config = config
        self._numbers = numbers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._numbers[name] if name in self._numbers else getattr(self._config, name)
