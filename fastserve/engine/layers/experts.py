"""Mixture-of-experts (MoE) layers with a weight layout for each expert.

transformers keeps the weights of all experts of a layer in two tensors, and multiplies with one expert after the other
or, on a GPU, with all at once. Here each expert's weight has a `WeightLayout`: packed for the CPU, or quantized. The
activation between the two products (`_apply_gate`) remains the model's own code.

Ranks have a part of every expert (tensor parallelism), or some experts whole (expert parallelism). Either way each rank
has all tokens, and one sum over the ranks is a layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.layouts.plain import PlainWeight
from fastserve.engine.layers.modules import set_untracked
from fastserve.engine.ranks.collectives import SINGLE_RANK, Collectives

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Parameter names in transformers; experts without a gate have `up_proj`."""


class ExpertsDelta(Protocol):
    """The LoRA adapters of a batch, for one experts module."""

    @property
    def is_needed(self) -> bool:
        """Whether an adapter of the step that is computed changes these experts."""
        ...

    def start(self, tokens: torch.Tensor, experts: torch.Tensor) -> None:
        """The pairs that are computed: the row of the batch and the expert of each (pairs,)."""
        ...

    def add(self, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the output of the pairs' adapters for `x` (pairs, in) to the experts' own products with the weight `name`
        (pairs, out), in place."""
        ...


class Experts(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Replaces a module for which `are_experts` is true."""

    _original: Any

    def __init__(
        self, original: torch.nn.Module, collectives: Collectives = SINGLE_RANK, whole_experts: range | None = None
    ) -> None:
        """`collectives`: of the ranks that have the other parts. `whole_experts`: those that this rank has, whose
        weights `original` holds; None: it has a part of every expert."""
        super().__init__()
        self.collectives = collectives
        set_untracked(self, "_original", original)
        self.num_experts: int = original.num_experts
        """On all ranks together."""
        self.own = range(self.num_experts) if whole_experts is None else whole_experts
        """Experts that this rank computes."""
        self.delta: ExpertsDelta | None = None
        self._has_parts = whole_experts is None and collectives.size > 1
        self.layouts: dict[str, list[WeightLayout]] = {}
        """By weight name, one layout for each of the rank's experts. A weight that is not listed is a parameter."""
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in original.named_children():
            self.add_module(name, child)

    @property
    def is_transposed(self) -> bool:
        """Whether the model's tensors are (experts, in, out)."""
        transposed: bool = self._original.is_transposed
        return transposed

    def set_layouts(self, name: str, layouts: list[WeightLayout]) -> None:
        self.layouts[name] = layouts
        for module in (self, self._original):
            module._parameters.pop(name, None)

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """`x` (tokens, hidden); `top_k_index` and `top_k_weights` (tokens, experts per token): the experts of each
        token and their routing weights -> (tokens, hidden)"""
        original = self._original
        has_norm = getattr(original, "has_post_expert_norm", False)  # missing in older releases of transformers
        pairs = top_k_index.flatten().argsort(stable=True)
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
        own = [
            (expert, of_expert)
            for expert, of_expert in enumerate(pairs.split(counts))
            if len(of_expert) and expert in self.own
        ]
        delta = self.delta if self.delta is not None and self.delta.is_needed else None
        # Adapters' products are computed for all experts at once.
        groups = [[one] for one in own] if delta is None or not own else [own]
        # In float32 and in the order of the experts, so that a token's sum does not depend on the rest of the batch.
        out = torch.zeros_like(x, dtype=torch.float32)
        for group in groups:
            experts = [expert for expert, _ in group]
            of_group = group[0][1] if len(group) == 1 else torch.cat([of_expert for _, of_expert in group])
            sizes = [len(of_expert) for _, of_expert in group]
            tokens = of_group // top_k_index.shape[-1]
            if delta is not None:
                delta.start(tokens, top_k_index.flatten()[of_group])
            y = self._of_experts(x[tokens], experts, sizes, delta)
            if has_norm:
                y = original.post_expert_norm(self.collectives.all_reduce(y, x.dtype) if self._has_parts else y)
            weighted = (y * top_k_weights.flatten()[of_group, None]).float()
            for to, part in zip(_split(tokens, sizes), _split(weighted, sizes), strict=True):
                out.index_add_(0, to, part)
        is_whole = has_norm and self._has_parts
        return out.to(x.dtype) if is_whole else self.collectives.all_reduce(out, x.dtype)

    def _of_experts(
        self, x: torch.Tensor, experts: Sequence[int], sizes: list[int], delta: ExpertsDelta | None
    ) -> torch.Tensor:
        """The experts' output for `x`, of which each expert has as many rows as `sizes` says."""
        original = self._original
        first = "gate_up_proj" if original.has_gate else "up_proj"
        activation = original._apply_gate if original.has_gate else original.act_fn
        inner = self._products(first, x, experts, sizes)
        if delta is not None:
            delta.add(first, x, inner)
        inner = activation(inner)
        y = self._products("down_proj", inner, experts, sizes)
        if delta is not None:
            delta.add("down_proj", inner, y)
        return y

    def _products(self, name: str, x: torch.Tensor, experts: Sequence[int], sizes: list[int]) -> torch.Tensor:
        parts = [
            self._product(name, expert - self.own.start, part)
            for expert, part in zip(experts, _split(x, sizes), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _product(self, name: str, index: int, x: torch.Tensor) -> torch.Tensor:
        """`index`: of an expert among the rank's own."""
        bias = getattr(self, f"{name}_bias")[index] if self._original.has_bias else None
        if name != "down_proj" or not self._has_parts:
            return self._layout(name, index).product(x, bias)
        # A partial sum: the bias, whole on every rank, is added by one.
        partial = self._layout(name, index).partial_product(x)
        return partial if bias is None or self.collectives.rank > 0 else partial + bias

    def _layout(self, name: str, index: int) -> WeightLayout:
        if name in self.layouts:
            return self.layouts[name][index]
        weight = getattr(self, name)[index]
        return PlainWeight(weight.t() if self.is_transposed else weight)


def _split(rows: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    """The rows of each expert. Often there is one, and each call of torch costs as much as a small product."""
    return (rows,) if len(sizes) == 1 else rows.split(sizes)


class ExpertsBesideAdapters(Experts):
    """Computes steps whose adapters change the experts; for others, the model's own code is faster on this device."""

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if self.delta is not None and self.delta.is_needed:
            return super().forward(x, top_k_index, top_k_weights)
        out: torch.Tensor = self._original(x, top_k_index, top_k_weights)
        return out


def are_experts(module: torch.nn.Module) -> bool:
    """Whether transformers lets other code compute this module (`use_experts_implementation`)."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def expert_weights(model: torch.nn.Module) -> dict[str, str]:
    """Names of the expert weights, (experts, out, in) or (experts, in, out), with the paths of their modules."""
    return {
        f"{path}.{name}": path
        for path, module in model.named_modules()
        if are_experts(module)
        for name, parameter in module.named_parameters(recurse=False)
        if name in WEIGHTS and parameter.dim() == 3
    }
