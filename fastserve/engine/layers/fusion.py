"""Replaces hot modules of a model by fused ones that compute the same.

Nothing here knows architectures. A module is found by its structure (a norm with a weight and an epsilon, a gated MLP),
compared with the fused one in float32 on random input, and replaced only when both agree up to rounding. A model that
computes something else keeps its own code, and the report (`FusedLayers`) says why. Attention: see fused_attention.py.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastserve.engine.contract import FusedLayers
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps
from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.linear import Linear
from fastserve.engine.layers.modules import replace_module, set_untracked
from fastserve.engine.layers.parallel import ParallelRMSNorm

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5
"""Allowed error in float32, relative to the largest entry of a row."""
NO_KERNELS = "there are no kernels for this device"
MODEL_CODE_ERRORS = (
    RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, ArithmeticError, AssertionError,
    StopIteration,
)  # fmt: skip
"""Raised by a model's code on input or in surroundings that it was not written for. In a faster way of computing, they
lead to the slower way; NotImplementedError is a RuntimeError."""


class FusedRMSNorm(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    _original: Any

    def __init__(self, norm: torch.nn.Module, eps: float, offset: float, kernels: ElementwiseOps) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = eps
        self.offset = offset
        self._kernels = kernels
        set_untracked(self, "_original", norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype:
            out: torch.Tensor = self._original(x)
            return out
        return self._kernels.rms_norm(x, self.weight, self.eps, self.offset)


class FusedGatedMLP(torch.nn.Module):  # type: ignore[misc]
    """down(silu(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(
        self, gate_up: Linear, parts: Sequence[WeightLayout], down: torch.nn.Module, kernels: ElementwiseOps
    ) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.parts = parts
        """The weight layouts of gate and up."""
        self.down_proj = down
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self._kernels.silu_and_mul(self.gate_up(x)))
        return out


def fuse_norms(model: torch.nn.Module, kernels: ElementwiseOps | None) -> FusedLayers:
    """Replace RMS norms."""
    offsets: dict[type[torch.nn.Module], float | None] = {}
    reasons: list[str | None] = []
    for path, module in list(model.named_modules()):
        if not _is_norm(module):
            continue
        if kernels is None:
            reasons.append(NO_KERNELS)
            continue
        if isinstance(module, ParallelRMSNorm):
            reasons.append("it sums over ranks")
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(eps, float):
            reasons.append(f"{type(module).__name__} has no epsilon")
            continue
        if type(module) not in offsets:
            try:
                offsets[type(module)] = _norm_offset(module, eps, kernels)
            except MODEL_CODE_ERRORS as error:
                logger.warning("%s is not fused: it fails on test input", type(module).__name__, exc_info=error)
                offsets[type(module)] = None
        offset = offsets[type(module)]
        if offset is None:
            reasons.append(f"{type(module).__name__} is not a plain RMS norm")
            continue
        replace_module(model, path, FusedRMSNorm(module, eps, offset, kernels))
        reasons.append(None)
    return report("norm", reasons)


def _norm_offset(module: torch.nn.Module, eps: float, kernels: ElementwiseOps) -> float | None:
    """Constant that the norm adds to its weight (1 in Gemma, else 0), or None if it is not a plain RMS norm."""
    norm = copy.deepcopy(module).float()
    with torch.no_grad():
        norm.weight.add_(torch.rand_like(norm.weight))
        if getattr(norm, "bias", None) is not None:
            norm.bias.add_(torch.rand_like(norm.bias))
    # Rows of very different magnitudes, with means far from 0, so that a norm that subtracts the mean differs.
    sizes = torch.tensor([[1e-2], [1.0], [30.0], [1e3]], device=norm.weight.device)
    x = (torch.randn(4, norm.weight.shape[0], device=norm.weight.device) + 2.0) * sizes
    expected = norm(x)
    candidates = ((offset, kernels.rms_norm(x, norm.weight, eps, offset)) for offset in (0.0, 1.0))
    return next((offset for offset, found in candidates if agree(expected, found)), None)


def find_gated_mlps(
    model: torch.nn.Module, kernels: ElementwiseOps | None, device_of: Callable[[str], torch.device]
) -> dict[str, str | None]:
    """For the path of each gated MLP: None if it computes down_proj(silu(gate_proj(x)) * up_proj(x)), else the reason
    why it cannot be fused. Weights may be on the meta device; `device_of` gives their later device by name."""
    found: dict[str, str | None] = {}
    same: dict[tuple[type[torch.nn.Module], type[torch.nn.Module], torch.device], bool] = {}
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if not children.keys() >= {"gate_proj", "up_proj", "down_proj"}:
            continue
        if kernels is None:
            found[path] = NO_KERNELS
            continue
        if not _is_gated_mlp(children):
            found[path] = f"{type(module).__name__} has other submodules"
            continue
        device = device_of(f"{path}.gate_proj.weight")
        kind = (type(module), type(module.act_fn), device)
        if kind not in same:
            same[kind] = _is_plain_gated_mlp(module, kernels, device)
        found[path] = None if same[kind] else f"{type(module).__name__} does not compute down(silu(gate(x)) * up(x))"
    return found


def place_gated_mlp(
    model: torch.nn.Module, path: str, whole: WeightLayout, parts: list[WeightLayout], kernels: ElementwiseOps
) -> None:
    """Replace a gated MLP by a fused one. `whole`: layout of gate and up together; `parts`: the layout of each."""
    down = model.get_submodule(f"{path}.down_proj")
    replace_module(model, path, FusedGatedMLP(Linear(whole, None), parts, down, kernels))


def _is_plain_gated_mlp(module: torch.nn.Module, kernels: ElementwiseOps, device: torch.device) -> bool:
    """Compare with the fused MLP, with small random weights instead of the module's own."""
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
            return agree(trial(x), fused)
        except (RuntimeError, AttributeError, TypeError, ValueError):
            return False  # it depends on its sizes, so it computes more than this


def _is_gated_mlp(children: dict[str, torch.nn.Module]) -> bool:
    return (
        children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and all(type(children[name]) is torch.nn.Linear for name in ("gate_proj", "up_proj", "down_proj"))
        and children["gate_proj"].bias is None
        and children["up_proj"].bias is None
    )


def agree(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two float32 results are equal up to rounding."""
    if expected.shape != found.shape:
        return False
    # Row by row: a large row must not hide errors in a small one.
    scale = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-20)
    return bool(((expected - found).abs() <= _TOLERANCE * scale).all())


def _is_norm(module: torch.nn.Module) -> bool:
    """Judged by the class name, so that a norm with unknown attribute names is reported as not fused."""
    if "norm" not in type(module).__name__.lower() or next(module.children(), None) is not None:
        return False
    # Asked for last: our linear layers and embeddings make their whole weight when they are asked.
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1


def report(kind: str, reasons: Sequence[str | None]) -> FusedLayers:
    """`reasons`: for each layer of this kind, why it is not fused; None if it is."""
    others = [reason for reason in reasons if reason is not None]
    return FusedLayers(kind, len(reasons) - len(others), len(reasons), "; ".join(dict.fromkeys(others)))
