"""Replaces hot parts of a model by fused ones, where they compute the same.

Nothing here knows architectures. A part is recognised by its shape (a norm with a weight and an epsilon, a gated MLP, a
forward that calls `apply_rotary_pos_emb`), tried on random input beside the fused form, and replaced only when both
agree to rounding. So a model that does something of its own keeps its own code.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from fastserve.engine.kernels.elementwise import ElementwiseKernels
from fastserve.engine.runner.linear import Linear, WeightForm, joint_form

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_ROTARY = "apply_rotary_pos_emb"


class FusedRMSNorm(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    def __init__(self, weight: torch.nn.Parameter, eps: float, offset: float, kernels: ElementwiseKernels) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps
        self._offset = offset
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, self.weight, self._eps, self._offset)


class FusedGatedMLP(torch.nn.Module):  # type: ignore[misc]
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, gate_up: Linear, down: torch.nn.Module, kernels: ElementwiseKernels) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = down
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self._kernels.silu_and_mul(self.gate_up(x)))
        return out


def fuse_norms(model: torch.nn.Module, kernels: ElementwiseKernels) -> int:
    """Replace RMS norms; return how many."""
    offsets: dict[type[torch.nn.Module], float | None] = {}
    count = 0
    for path, module in list(model.named_modules()):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not isinstance(eps, float) or weight is None or weight.dim() != 1 or not _is_leaf(module):
            continue
        if type(module) not in offsets:
            offsets[type(module)] = _norm_offset(module, weight, eps, kernels)
        offset = offsets[type(module)]
        if offset is not None:
            _replace(model, path, FusedRMSNorm(weight, eps, offset, kernels))
            count += 1
    return count


def _norm_offset(
    module: torch.nn.Module, weight: torch.Tensor, eps: float, kernels: ElementwiseKernels
) -> float | None:
    """What the norm adds to its weight (1 in Gemma), or None when it is no plain RMS norm."""
    x = torch.randn(3, weight.shape[0]).to(weight.dtype)
    expected = module(x)
    return next((offset for offset in (0.0, 1.0) if _agree(expected, kernels.rms_norm(x, weight, eps, offset))), None)


def fuse_gated_mlps(model: torch.nn.Module, kernels: ElementwiseKernels) -> dict[str, WeightForm]:
    """Replace modules of the form down_proj(act_fn(gate_proj(x)) * up_proj(x)) by a fused one, where the activation is
    SiLU; return the forms of the weights that became one, by name."""
    forms: dict[str, WeightForm] = {}
    for path, module in list(model.named_modules()):
        if not _is_gated_mlp(module):
            continue
        gate, up = module.gate_proj.weight.data, module.up_proj.weight.data
        whole, parts = joint_form([gate, up])
        fused = FusedGatedMLP(Linear(whole, None), module.down_proj, kernels)
        x = torch.randn(3, gate.shape[1]).to(gate.dtype)
        if _agree(module(x), fused(x)):
            _replace(model, path, fused)
            names = (f"{path}.gate_proj.weight", f"{path}.up_proj.weight")
            forms |= dict(zip(names, parts, strict=True))
    return forms


def _is_gated_mlp(module: torch.nn.Module) -> bool:
    children = dict(module.named_children())
    return (
        children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and all(type(children[name]) is torch.nn.Linear for name in ("gate_proj", "up_proj", "down_proj"))
        and children["gate_proj"].bias is None
        and children["up_proj"].bias is None
    )


def fuse_rotary(model: torch.nn.Module, kernels: ElementwiseKernels) -> int:
    """Have the attention modules' own forward call our rotary embedding; return how many do."""

    def ours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)

    count = 0
    for module in model.modules():
        forward = type(module).forward
        known = getattr(forward, "__globals__", {})
        if _ROTARY not in getattr(forward, "__code__", _NO_CODE).co_names or _ROTARY not in known:
            continue
        dim, dtype = getattr(module, "head_dim", None), next(model.parameters()).dtype
        if not isinstance(dim, int) or not _same_rotary(known[_ROTARY], ours, dim, dtype):
            continue
        # The same code with one global name bound anew, for this instance alone: the library stays as it is.
        bound = types.FunctionType(
            forward.__code__, {**known, _ROTARY: ours}, forward.__name__, forward.__defaults__, forward.__closure__
        )
        bound.__kwdefaults__ = forward.__kwdefaults__
        module.forward = types.MethodType(bound, module)
        count += 1
    return count


_NO_CODE = (lambda: None).__code__


def _same_rotary(theirs: Callable[..., Any], ours: Callable[..., Any], dim: int, dtype: torch.dtype) -> bool:
    q, k = torch.randn(1, 5, 3, dim).to(dtype), torch.randn(1, 2, 3, dim).to(dtype)
    half = torch.randn(1, 3, dim // 2)
    cos, sin = (torch.cat([wave, wave], dim=-1).to(dtype) for wave in (half.cos(), half.sin()))
    try:
        expected = theirs(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # it takes something else
    return all(_agree(one, other) for one, other in zip(expected, ours(q, k, cos, sin), strict=True))


def _agree(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    scale = expected.abs().max().clamp_min(1e-6)
    return bool((expected - found).abs().max() <= _TOLERANCE[expected.dtype] * scale)


def _is_leaf(module: torch.nn.Module) -> bool:
    return next(module.children(), None) is None and len(list(module.parameters())) == 1


def _replace(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
