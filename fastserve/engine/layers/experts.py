"""Experts of a mixture (MoE) with weights in layouts of their own, as linear layers have them.

transformers keeps the weights of all experts of a layer in two tensors, and multiplies with those of one expert after
the other or, on a GPU, with all at once. Here each expert's weight has a `WeightLayout`: packed for the CPU, or
quantized. What is between the two products (`_apply_gate`) stays the model's own code.
"""

from __future__ import annotations

from typing import Any

import torch

from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.layouts.plain import PlainWeight

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""How transformers calls them; those without a gate have `up_proj`."""


class Experts(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Stands in the place of a module of the kind that `are_experts` finds."""

    def __init__(self, like: torch.nn.Module) -> None:
        super().__init__()
        self._like: list[Any] = [like]  # in a list, so that its parameters are not found below this module
        self.num_experts: int = like.num_experts
        self.layouts: dict[str, list[WeightLayout]] = {}
        """Of each expert, by the weight's name. A weight that is not here is a parameter."""
        for name, parameter in like.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in like.named_children():
            self.add_module(name, child)

    @property
    def is_transposed(self) -> bool:
        """Whether the model's tensors are (experts, in, out)."""
        found: bool = self._like[0].is_transposed
        return found

    def set_layouts(self, name: str, layouts: list[WeightLayout]) -> None:
        self.layouts[name] = layouts
        for module in (self, self._like[0]):
            module._parameters.pop(name, None)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """`x` (tokens, hidden), and for each token its experts and their shares of the sum (tokens, experts per token)
        -> (tokens, hidden)"""
        like = self._like[0]
        first = "gate_up_proj" if like.has_gate else "up_proj"
        between = like._apply_gate if like.has_gate else like.act_fn
        has_norm = getattr(like, "has_post_expert_norm", False)  # older releases of transformers have none
        pairs = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.num_experts).tolist()
        # In float32, and in the order of the experts: a token's sum is the same whatever is beside it in the batch.
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert, of_expert in enumerate(pairs.split(counts)):
            if not len(of_expert):
                continue
            tokens = of_expert // chosen.shape[-1]
            y = self._product("down_proj", expert, between(self._product(first, expert, x[tokens])))
            if has_norm:
                y = like.post_expert_norm(y)
            out.index_add_(0, tokens, (y * shares.flatten()[of_expert, None]).float())
        return out.to(x.dtype)

    def _product(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self._like[0].has_bias else None
        return self._layout(name, expert).product(x, bias)

    def _layout(self, name: str, expert: int) -> WeightLayout:
        if name in self.layouts:
            return self.layouts[name][expert]
        weight = getattr(self, name)[expert]
        return PlainWeight(weight.t() if self.is_transposed else weight)


def are_experts(module: torch.nn.Module) -> bool:
    """Whether it is a module that transformers lets others compute (`use_experts_implementation`)."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def expert_weights(model: torch.nn.Module) -> dict[str, str]:
    """Path of the module for the name of each weight (experts, out, in) or (experts, in, out)."""
    return {
        f"{path}.{name}": path
        for path, module in model.named_modules()
        if are_experts(module)
        for name, parameter in module.named_parameters(recurse=False)
        if name in WEIGHTS and parameter.dim() == 3
    }
