"""Paged attention behind transformers' attention interface.

transformers' own model code calls it layer by layer with one packed batch: the new tokens of all sequences of the
step, one after the other. A backend (one for each device) stores their keys and values in the KV cache, and computes
causal attention within each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastserve.engine.attention.backend import AttentionBackend, KVCache, StepSize
from fastserve.engine.attention.masks import CausalMask, MaskLabels, Rule
from fastserve.engine.attention.metadata import AttentionMetadata, AttentionParams, LayerShape
from fastserve.engine.kernels.device_step import DeviceStep

FindBackend = Callable[[torch.device, Sequence[LayerShape], torch.dtype, int], AttentionBackend]
"""Returns the backend for these layers on a device, in a dtype and with a block size."""
_NAME = "fastserve_paged"
_NAME_WITH_MASKS = "fastserve_paged_with_masks"
"""The same attention for an observed forward pass, in which masks are made."""
_active: ContextVar[PagedAttention | None] = ContextVar("_active", default=None)
"""The engine whose forward pass runs: several may be in one process, but transformers calls all by one name."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Arguments of one layer's call of the attention function."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    mask: CausalMask
    softcap: float | None
    has_sinks: bool

    @property
    def shape(self) -> LayerShape:
        return LayerShape(
            self.query.shape[1], self.key.shape[1], self.key.shape[-1], self.value.shape[-1],
            self.scaling, self.softcap, self.mask.window, self.has_sinks, self.mask.chunk,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the call, without sinks and mask."""
        return {"scaling": self.scaling, "softcap": self.softcap}


class PagedAttention:
    """Owns the KV cache of all layers; each layer's is on the device that computes the layer.

    Layers call it within one of two context managers: `observed`, before there is a KV cache, or `running`, in the
    forward pass of a step.
    """

    def __init__(self, find_backend: FindBackend) -> None:
        self.shapes: dict[int, LayerShape] = {}
        """Attention shapes by layer index."""
        self.devices: dict[int, torch.device] = {}
        self._find_backend = find_backend
        self._backends: dict[torch.device, AttentionBackend] = {}
        self._caches: dict[int, KVCache] = {}
        self._step: AttentionMetadata | DeviceStep | None = None
        self._calls: list[AttentionCall] | None = None
        self._labels = MaskLabels()

    # ---- before there is a KV cache -----------------------------------------------------------------------------

    @contextmanager
    def observed(self) -> Iterator[list[AttentionCall]]:
        """Within the block, calls of attention are recorded and not computed."""
        calls: list[AttentionCall] = []
        self._calls = calls
        try:
            with _activated(self):
                yield calls
        finally:
            self._calls = None

    def learn_layers(self, calls: Sequence[AttentionCall]) -> None:
        """Take each layer's attention shape and device from its call in a forward pass."""
        for call in calls:
            layer: int = call.module.layer_idx
            self.shapes[layer], self.devices[layer] = call.shape, call.query.device

    def make_label(self, device: torch.device, rule: Rule, size: int | None) -> torch.Tensor | None:
        """Stands for the mask in an observed forward pass; None outside of `observed`."""
        return None if self._calls is None else self._labels.label(device, rule, size)

    def shapes_on(self, device: torch.device) -> list[LayerShape]:
        """Attention shapes of the device's layers."""
        return [shape for layer, shape in self.shapes.items() if self.devices[layer] == device]

    def bytes_per_token(self, block_size: int, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes of one token in the KV cache on the device."""
        shapes = self.shapes_on(device)
        backend = self._find_backend(device, shapes, dtype, block_size)
        return sum(map(backend.bytes_per_token, shapes))

    def workspace_bytes(self, block_size: int, dtype: torch.dtype, device: torch.device, size: StepSize) -> int:
        """Memory of attention on the device in bytes, without the KV cache, inputs and outputs."""
        shapes = self.shapes_on(device)
        return self._find_backend(device, shapes, dtype, block_size).workspace_bytes(shapes, size) if shapes else 0

    def allocate(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        """Allocate the KV cache of all layers."""
        self._backends = {
            device: self._find_backend(device, self.shapes_on(device), dtype, block_size)
            for device in dict.fromkeys(self.devices.values())
        }
        self._caches = {
            layer: self._backends[self.devices[layer]].make_cache(shape, num_blocks)
            for layer, shape in self.shapes.items()
        }

    # ---- with one -----------------------------------------------------------------------------------------------

    @property
    def backend(self) -> AttentionBackend | None:
        """The backend of all layers; None where there are several."""
        return next(iter(self._backends.values())) if len(self._backends) == 1 else None

    def caches(self) -> list[KVCache]:
        """The KV cache of each layer, in order."""
        return [self._caches[layer] for layer in sorted(self._caches)]

    @contextmanager
    def running(self, step: AttentionMetadata | DeviceStep) -> Iterator[None]:
        """Within the block, calls of attention belong to `step`."""
        self._step = step
        try:
            with _activated(self):
                yield
        finally:
            self._step = None

    @property
    def is_running(self) -> bool:
        """Whether a step is computed, in which all sequences are one row."""
        return self._step is not None

    def is_long(self, device: torch.device) -> torch.Tensor | None:
        """(tokens,) whether each token's sequence of the step has the rotary frequencies of long ones; None: none
        has."""
        step = self._step
        if isinstance(step, DeviceStep):
            return step.is_long
        if step is None or step.is_long is None:
            return None
        found: torch.Tensor | None = step.cache.get(("is_long", device))
        if found is None:
            found = step.cache["is_long", device] = torch.from_numpy(step.is_long).to(device)
        return found

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """`query` (1, heads, tokens, key dim), `key` and `value` (1, KV heads, tokens, dim) -> (1, tokens, heads,
        value dim). Window and chunks are those that the layer was observed with."""
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        if self._calls is not None:
            mask = self._labels.mask(attention_mask) or CausalMask(window=sliding_window)
            self._calls.append(
                AttentionCall(module, query, key, value, scaling, mask, softcap, has_sinks=s_aux is not None)
            )
            return _dummy_output(query, value), None
        if self._step is None:
            raise RuntimeError("attention was called outside a step")
        layer: int = module.layer_idx
        new = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
        shape = self.shapes[layer]
        params = AttentionParams(scaling, shape.window, softcap, s_aux, shape.chunk)
        out = self._backends[self.devices[layer]](self._step, *new, self._caches[layer], params)
        return out.unsqueeze(0), None


def attention_implementation() -> str:
    """The name of our attention for a model's `attn_implementation`.

    No mask function is registered under it, so models build no mask: the backend applies the one of the layer. (With
    one that returns None, transformers would read the positions first, and wait for the device.)
    """
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _call_active)
    return _NAME


@contextmanager
def making_masks(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, `model` makes masks for our attention, whose calls must be observed."""
    ALL_ATTENTION_FUNCTIONS.register(_NAME_WITH_MASKS, _call_active)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME_WITH_MASKS, _label_mask)
    ours = model.config._attn_implementation
    model.set_attn_implementation(_NAME_WITH_MASKS)
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def _label_mask(*_: Any, mask_function: Rule, device: torch.device, local_size: int | None = None, **__: Any) -> Any:
    """transformers' mask interface: returns a label in place of a mask."""
    attention = _active.get()
    return None if attention is None else attention.make_label(device, mask_function, local_size)


def _call_active(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    attention = _active.get()
    if attention is None:
        raise RuntimeError("attention was called outside a step")
    return attention(*args, **kwargs)


@contextmanager
def _activated(attention: PagedAttention) -> Iterator[None]:
    token = _active.set(attention)
    try:
        yield
    finally:
        _active.reset(token)


def _dummy_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Numbers in the shape of an output. Not zeros, which would hide what a layer does with its output."""
    shape = (1, query.shape[2], query.shape[1], value.shape[-1])
    return torch.arange(math.prod(shape), device=query.device).sin().to(query.dtype).view(shape)
