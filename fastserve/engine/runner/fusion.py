"""Replaces hot parts of a model by fused ones, where they compute the same.

Nothing here knows architectures. A part is recognised by its shape (a norm with a weight and an epsilon, a gated MLP, a
forward that calls `apply_rotary_pos_emb`), tried in float32 on random input beside the fused form, and replaced only
when both agree to rounding. So a model that does something of its own keeps its own code.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastserve.engine.kernels.fused_steps import FusedSteps
from fastserve.engine.runner.linear import Linear, WeightForm, joint_form

_TOLERANCE = 1e-5
"""Of trials in float32, relative to the largest entry."""
_ROTARY = "apply_rotary_pos_emb"


class FusedRMSNorm(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    def __init__(self, norm: torch.nn.Module, eps: float, offset: float, kernels: FusedSteps) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = eps
        self.offset = offset
        self._kernels = kernels
        self._own = (norm,)  # in a tuple, so that it is no child, whose weight would have a second name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype:
            out: torch.Tensor = self._own[0](x)
            return out
        return self._kernels.rms_norm(x, self.weight, self.eps, self.offset)


class FusedGatedMLP(torch.nn.Module):  # type: ignore[misc]
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(
        self, gate_up: Linear, parts: Sequence[WeightForm], down: torch.nn.Module, kernels: FusedSteps
    ) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.parts = parts
        """The forms of gate and up."""
        self.down_proj = down
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self._kernels.silu_and_mul(self.gate_up(x)))
        return out


def fuse_norms(model: torch.nn.Module, kernels: FusedSteps) -> int:
    """Replace RMS norms; return how many."""
    offsets: dict[type[torch.nn.Module], float | None] = {}
    count = 0
    for path, module in list(model.named_modules()):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(eps, float) or not _is_leaf(module) or getattr(module, "weight", None) is None:
            continue
        if module.weight.dim() != 1:
            continue
        if type(module) not in offsets:
            offsets[type(module)] = _norm_offset(module, eps, kernels)
        offset = offsets[type(module)]
        if offset is not None:
            _replace(model, path, FusedRMSNorm(module, eps, offset, kernels))
            count += 1
    return count


def _norm_offset(module: torch.nn.Module, eps: float, kernels: FusedSteps) -> float | None:
    """What the norm adds to its weight (1 in Gemma), or None when it is no plain RMS norm."""
    norm = copy.deepcopy(module).float()
    with torch.no_grad():
        norm.weight.add_(torch.rand_like(norm.weight))
    # Rows of very different sizes, with means far from 0: a norm that subtracts the mean is found out.
    sizes = torch.tensor([[1e-2], [1.0], [30.0], [1e3]], device=norm.weight.device)
    x = (torch.randn(4, norm.weight.shape[0], device=norm.weight.device) + 2.0) * sizes
    expected = norm(x)
    forms = ((offset, kernels.rms_norm(x, norm.weight, eps, offset)) for offset in (0.0, 1.0))
    return next((offset for offset, found in forms if _agree(expected, found)), None)


def fuse_gated_mlps(model: torch.nn.Module, kernels: FusedSteps) -> dict[str, WeightForm]:
    """Of a model that has its weights; return the forms of those that became one, by name."""
    forms: dict[str, WeightForm] = {}
    device = next(model.parameters()).device
    for path in find_gated_mlps(model, kernels, lambda _: device):
        mlp = model.get_submodule(path)
        parts = fuse_gated_mlp(model, path, mlp.gate_proj.weight.data, mlp.up_proj.weight.data, kernels)
        forms |= {f"{path}.gate_proj.weight": parts[0], f"{path}.up_proj.weight": parts[1]}
    return forms


def find_gated_mlps(model: torch.nn.Module, kernels: FusedSteps, device_of: Callable[[str], torch.device]) -> list[str]:
    """Paths of modules of the form down_proj(act_fn(gate_proj(x)) * up_proj(x)) where the activation is SiLU. Their
    weights may be on the meta device; `device_of` says where they will be."""
    paths = []
    same: dict[tuple[type[torch.nn.Module], type[torch.nn.Module], torch.device], bool] = {}
    for path, module in model.named_modules():
        if not _is_gated_mlp(module):
            continue
        device = device_of(f"{path}.gate_proj.weight")
        kind = (type(module), type(module.act_fn), device)
        if kind not in same:
            same[kind] = _is_plain_gated_mlp(module, kernels, device)
        if same[kind]:
            paths.append(path)
    return paths


def fuse_gated_mlp(
    model: torch.nn.Module, path: str, gate: torch.Tensor, up: torch.Tensor, kernels: FusedSteps
) -> list[WeightForm]:
    """Replace one of those that were found by a fused module; return the forms of its gate and up."""
    whole, parts = joint_form([gate, up])
    place_gated_mlp(model, path, whole, parts, kernels)
    return parts


def place_gated_mlp(
    model: torch.nn.Module, path: str, whole: WeightForm, parts: list[WeightForm], kernels: FusedSteps
) -> None:
    """The same with the form of both, and of each of them."""
    down = model.get_submodule(f"{path}.down_proj")
    _replace(model, path, FusedGatedMLP(Linear(whole, None), parts, down, kernels))


def _is_plain_gated_mlp(module: torch.nn.Module, kernels: FusedSteps, device: torch.device) -> bool:
    """Tried with small weights in the places of its own."""
    width, inner = 16, 32
    trial = copy.copy(module)
    trial._modules = dict(module._modules)
    sizes = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    for name, size in sizes.items():
        setattr(trial, name, torch.nn.Linear(*size, bias=False, device=device, dtype=torch.float32))
    x = torch.randn(4, width, device=device) * 3.0
    with torch.no_grad():
        gate_up = torch.cat([trial.gate_proj(x), trial.up_proj(x)], dim=-1) * 3.0
        fused = trial.down_proj(kernels.silu_and_mul(gate_up))
        for name in ("gate_proj", "up_proj"):
            getattr(trial, name).weight.mul_(3.0)
        try:
            return _agree(trial(x), fused)
        except (RuntimeError, AttributeError, TypeError, ValueError):
            return False  # it looks at its sizes: it does more than this


def _is_gated_mlp(module: torch.nn.Module) -> bool:
    children = dict(module.named_children())
    return (
        children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and all(type(children[name]) is torch.nn.Linear for name in ("gate_proj", "up_proj", "down_proj"))
        and children["gate_proj"].bias is None
        and children["up_proj"].bias is None
    )


def fuse_rotary(model: torch.nn.Module, kernels: FusedSteps) -> int:
    """Have the attention modules' own forward call our rotary embedding; return how many do."""
    count = 0
    found: dict[tuple[Callable[..., Any], int], Callable[..., Any] | None] = {}
    device = next(model.parameters()).device
    for module in model.modules():
        forward = type(module).forward
        known = getattr(forward, "__globals__", {})
        if _ROTARY not in getattr(forward, "__code__", _NO_CODE).co_names or _ROTARY not in known:
            continue
        dim = getattr(module, "head_dim", None)
        if not isinstance(dim, int):
            continue
        key = (known[_ROTARY], dim)
        if key not in found:
            found[key] = _rotary_like(known[_ROTARY], dim, kernels, device)
        ours = found[key]
        if ours is None:
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


def _rotary_like(
    theirs: Callable[..., Any], dim: int, kernels: FusedSteps, device: torch.device
) -> Callable[..., Any] | None:
    """A function in the place of `theirs` that is fused where that computes the same, or None when it never does."""

    def ours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any) -> Any:
        plain = not more and not named and q.dim() == 4 and q.shape[0] == k.shape[0] == 1 and cos.dim() == 3
        # Some models turn only a part of the head, or keep cos and sin in float32.
        fits = cos.shape[-1] == sin.shape[-1] == q.shape[-1] == k.shape[-1] and cos.shape[1] == q.shape[2] == k.shape[2]
        if plain and fits and q.dtype == k.dtype == cos.dtype == sin.dtype:
            return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)
        return theirs(q, k, cos, sin, *more, **named)

    q, k = torch.randn(1, 5, 3, dim, device=device), torch.randn(1, 2, 3, dim, device=device)
    half = torch.randn(1, 3, dim // 2, device=device)
    cos, sin = (torch.cat([wave, wave], dim=-1) for wave in (half.cos(), half.sin()))
    try:
        expected = theirs(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None  # it takes something else
    same = all(_agree(one, other) for one, other in zip(expected, ours(q, k, cos, sin), strict=True))
    return ours if same else None


def _agree(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    # Row by row: a large row must not hide what is wrong in a small one.
    scale = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-20)
    return bool(((expected - found).abs() <= _TOLERANCE * scale).all())


def _is_leaf(module: torch.nn.Module) -> bool:
    return next(module.children(), None) is None and len(list(module.parameters())) == 1


def _replace(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
