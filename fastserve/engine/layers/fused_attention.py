"""Attention layers with a fused rotary embedding kernel, where that computes the same.

A layer is found by its call of the attention function registered with transformers, whatever its name. Each one is
tested: its own forward and the fused one run in float32 on the same random input, with random projections, random
angles and positions up to the end of the context, and must pass the same queries, keys, values and settings to the
attention function and the same values to the output projection. A layer that does anything else (clips, gates, scales
far positions, rotates interleaved halves) keeps its own code.

Rejected: running the model's forward with one of its globals replaced. How a library wraps its functions changes with
its releases; the computation of an attention layer does not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fastserve.engine.attention.masks import UnknownMaskError
from fastserve.engine.attention.paged import AttentionCall, PagedAttention, making_masks
from fastserve.engine.contract import FusedLayers
from fastserve.engine.devices.find import device_of
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps
from fastserve.engine.layers.fusion import MODEL_CODE_ERRORS, NO_KERNELS, agree, report
from fastserve.engine.layers.modules import replace_module
from fastserve.errors import StartupError

_ONE_INPUT = ("qkv_proj",)
_INPUTS = (("q_proj", "k_proj", "v_proj"), _ONE_INPUT)
_OUTPUTS = ("o_proj", "out_proj", "dense")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
"""Names of the modules of an attention layer in transformers' models."""
_TEST_SCALES = (1e-2, 1.0, 30.0, 1e3)
"""Magnitudes of the test rows: clipping or another nonlinearity shows at one of them."""


class _DifferentError(Exception):
    """The layer cannot be fused; the message says why."""


@dataclass(frozen=True, slots=True)
class _Call:
    """How the model calls an attention layer."""

    hidden_states: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    others: dict[str, Any]
    """All other keyword arguments."""


class FusedAttention(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """QKV projection, norms of queries and keys, rotary embedding, paged attention and output projection."""

    def __init__(
        self, module: torch.nn.Module, call: AttentionCall, attention: PagedAttention, kernels: ElementwiseOps
    ) -> None:
        """`call`: a call of the attention function by `module`. Raises _DifferentError if `module` has other
        submodules."""
        super().__init__()
        children = dict(module.named_children())
        inputs = next((names for names in _INPUTS if children.keys() >= set(names)), None)
        output = next((name for name in _OUTPUTS if name in children), None)
        if inputs is None or output is None:
            raise _DifferentError(f"has other submodules ({', '.join(children)})")
        norms = next((names for names in _NORMS if children.keys() >= set(names)), None)
        known = {*inputs, output, *(norms or ())}
        own = [name for name, _ in module.named_parameters(recurse=False)]
        unknown = own + [
            name for name, child in children.items() if name not in known and next(child.parameters(), None) is not None
        ]
        if unknown:
            raise _DifferentError(f"has unknown parameters ({', '.join(unknown)})")
        for name in known:
            self.add_module(name, children[name])
        self.layer_idx = module.layer_idx
        self._input_names, self._output_name, self._norm_names = inputs, output, norms
        self._dim = call.query.shape[-1]
        self.split = [tensor.shape[1] * tensor.shape[3] for tensor in (call.query, call.key, call.value)]
        """Widths of queries, keys and values."""
        self._settings = call.settings
        self._attention = attention
        self._kernels = kernels

    @property
    def inputs(self) -> list[torch.nn.Module]:
        """The projections of queries, keys and values, or a single one for all three."""
        return [self._modules[name] for name in self._input_names]

    @property
    def output(self) -> torch.nn.Module:
        return self._modules[self._output_name]

    @property
    def norms(self) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
        """Norms of queries and of keys."""
        names = self._norm_names
        return (None, None) if names is None else (self._modules[names[0]], self._modules[names[1]])

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` (1, tokens, hidden), cosines and sines (1, tokens, rotary dim) -> (1, tokens, hidden)"""
        projected = [projection(hidden_states) for projection in self.inputs]
        query, key, value = projected if len(projected) == 3 else projected[0].split(self.split, dim=-1)
        query_norm, key_norm = self.norms
        cos, sin = position_embeddings
        attended = self._attention(
            self,
            self._rotated(query, query_norm, cos, sin),
            self._rotated(key, key_norm, cos, sin),
            value.unflatten(-1, (-1, self._dim)).transpose(1, 2),
            None,
            **self._settings,
        )
        return self.output(attended[0].flatten(2)), None

    def _rotated(
        self, x: torch.Tensor, norm: torch.nn.Module | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """(1, tokens, heads * dim) -> (1, heads, tokens, dim)"""
        # A norm applies to each head, or to all heads together.
        all_heads = norm is not None and norm.weight.shape[0] == x.shape[-1]
        if norm is not None and all_heads:
            x = norm(x)
        x = x.unflatten(-1, (-1, self._dim))
        if norm is not None and not all_heads:
            x = norm(x)
        x = x.transpose(1, 2)
        size = cos.shape[-1]
        if size == self._dim:
            return self._kernels.rotary(x, cos, sin)
        return torch.cat([self._kernels.rotary(x[..., :size], cos, sin), x[..., size:]], dim=-1)


def fuse_attention(
    model: PreTrainedModel,
    attention: PagedAttention,
    kernels: ElementwiseOps | None,
    context_length: int,
    device: torch.device,
) -> FusedLayers:
    """Replace the attention layers of `model`, which call `attention`, by fused ones. `device`: the device of the token
    ids."""
    layers, calls = _observe(model, attention, device)
    if kernels is None:
        return report("attention", [NO_KERNELS] * len(layers))
    paths = {module: path for path, module in model.named_modules()}
    reasons: list[str | None] = []
    for module, asked in layers.items():
        try:
            call = _read_call(*calls[module], asked)
            with device_of(call.hidden_states.device).current():
                _require_same(module, call, asked, attention, kernels, context_length)
            replace_module(model, paths[module], FusedAttention(module, asked, attention, kernels))
            reasons.append(None)
        except _DifferentError as error:
            reasons.append(f"{type(module).__name__} {error}")
        except MODEL_CODE_ERRORS as error:
            reasons.append(f"{type(module).__name__} fails on test input ({error})")
    return report("attention", reasons)


def _observe(
    model: PreTrainedModel, attention: PagedAttention, device: torch.device
) -> tuple[dict[torch.nn.Module, AttentionCall], dict[torch.nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Run one token: the call of the attention function by each attention layer, and the arguments of each module.

    Raises StartupError when a layer has a mask that the engine cannot compute."""
    calls: dict[torch.nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = (args, kwargs)

    layers = [module for module in model.modules() if hasattr(module, "layer_idx")]
    handles: list[Any] = [module.register_forward_pre_hook(note, with_kwargs=True) for module in layers]
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        with making_masks(model), attention.observed() as observed, torch.inference_mode():
            model(input_ids=token, position_ids=token, use_cache=False)
    except UnknownMaskError as error:
        raise StartupError(
            f"{type(model).__name__} cannot be served: the mask of its attention is neither causal nor a window or "
            "chunks of causal attention."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    attention.learn_layers(observed)
    return {call.module: call for call in observed}, calls


def _read_call(args: tuple[Any, ...], kwargs: dict[str, Any], asked: AttentionCall) -> _Call:
    others = dict(kwargs)
    hidden_states = others.pop("hidden_states", args[0] if len(args) == 1 else None)
    embeddings = others.pop("position_embeddings", None)
    if len(args) > 1 or not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() != 3:
        raise _DifferentError("is not called with hidden states alone")
    if not isinstance(embeddings, tuple) or len(embeddings) != 2:
        raise _DifferentError("takes no rotary embedding (cosines and sines)")
    cos, sin = embeddings
    if not all(isinstance(table, torch.Tensor) and table.dim() == 3 for table in (cos, sin)) or cos.shape != sin.shape:
        raise _DifferentError("takes a rotary embedding of another shape")
    if not cos.dtype == sin.dtype == asked.query.dtype == asked.key.dtype == hidden_states.dtype:
        raise _DifferentError(f"takes cosines and sines in {str(cos.dtype).removeprefix('torch.')}")
    if cos.shape[-1] > asked.query.shape[-1] or cos.shape[-1] % 2 or asked.value.shape[-1] != asked.query.shape[-1]:
        raise _DifferentError("has heads of another shape")
    if any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in others.values()):
        raise _DifferentError("takes more than hidden states and a rotary embedding")
    return _Call(hidden_states, cos, sin, others)


class _FixedOutput(torch.nn.Module):  # type: ignore[misc]
    """Stands in for a projection: returns a fixed output and keeps its input."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self._output = output
        self.input: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.input = x
        return self._output


def _require_same(
    module: torch.nn.Module,
    call: _Call,
    asked: AttentionCall,
    attention: PagedAttention,
    kernels: ElementwiseOps,
    context_length: int,
) -> None:
    """Raise _DifferentError unless the fused layer computes what `module` does."""
    fused = FusedAttention(module, asked, attention, kernels)  # while it has its own projections
    generator = torch.Generator().manual_seed(0)
    device = call.hidden_states.device
    count = len(_TEST_SCALES)

    def random(size: int) -> torch.Tensor:
        rows = torch.randn(1, count, size, generator=generator) * torch.tensor(_TEST_SCALES).unsqueeze(1)
        return rows.to(device)

    trial = copy.copy(module)
    trial._modules = dict(module._modules)
    names = {child: name for name, child in module.named_children()}
    hidden_size = call.hidden_states.shape[-1]
    sizes = fused.split if len(fused.inputs) == 3 else [sum(fused.split)]
    inputs = [_FixedOutput(random(size)) for size in sizes]
    output = _FixedOutput(random(hidden_size))
    for projection, stand_in in zip((*fused.inputs, fused.output), (*inputs, output), strict=True):
        trial._modules[names[projection]] = stand_in
    angles = torch.randn(1, count, call.cos.shape[-1] // 2, generator=generator).to(device)
    cos, sin = (torch.cat([half, half], dim=-1) for half in (angles.cos(), angles.sin()))
    positions = torch.linspace(0, context_length - 1, count, device=device).long().unsqueeze(0)
    others = {name: _at_positions(value, positions) for name, value in call.others.items()}
    named = {**others, "hidden_states": random(hidden_size), "position_embeddings": (cos, sin)}

    def run(layer: torch.nn.Module) -> tuple[AttentionCall, torch.Tensor, Any]:
        with attention.observed() as observed, torch.inference_mode():
            result = layer.forward(**named)
        if len(observed) != 1 or output.input is None:
            raise _DifferentError("does not call attention and output projection once")
        if any(stand_in.input is not named["hidden_states"] for stand_in in inputs):
            raise _DifferentError("does not project its hidden states as they are")
        return observed[0], output.input, result

    theirs, their_heads, their_result = run(trial)
    ours, our_heads, _ = run(FusedAttention(trial, asked, attention, kernels))
    if not isinstance(their_result, tuple) or len(their_result) != 2 or their_result[0] is not output._output:
        raise _DifferentError("changes the result of the output projection")
    if theirs.settings != ours.settings or theirs.has_sinks:
        raise _DifferentError("calls attention with other settings at other positions")
    for name in ("query", "key", "value"):
        if not agree(getattr(theirs, name), getattr(ours, name)):
            raise _DifferentError(f"computes the {name} differently from its projection")
    if not agree(their_heads, our_heads):
        raise _DifferentError("changes the attention output before its projection")


def _at_positions(value: Any, positions: torch.Tensor) -> Any:
    """Replace the position of the one token by the test positions."""
    if isinstance(value, torch.Tensor) and value.shape == (1, 1):
        return positions.to(value.dtype)
    if isinstance(value, torch.Tensor) and value.shape == (1,):
        return positions[0].to(value.dtype)
    return value
