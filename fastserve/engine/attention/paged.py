"""Paged attention behind transformers' attention interface.

transformers' own model code calls it layer by layer with one packed batch: the new tokens of all sequences of the
step, one after the other. It stores their keys and values in the pages, and lets every token look at its sequence's
pages only. On a CPU with a compiler a kernel does both (engine/kernels); what stands here in plain torch operations
does the same on any device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fastserve.engine.kernels.device_step import DeviceStep
from fastserve.engine.kernels.paged_attention import LANES, KernelStep, PagedAttentionKernel

if TYPE_CHECKING:
    from fastserve.engine.kernels.triton_attention import TritonPagedAttention

IntArray = npt.NDArray[np.int32]
_MOST_GATHERED_TOKENS = 1 << 16
"""Of a padded batch of contexts, in the implementation in torch operations."""


@dataclass(slots=True)
class AttentionMetadata:
    """Where the tokens of a step lie. Sequences of one new token come before those of several."""

    starts: IntArray
    """(sequences,) row of the batch of each sequence's first new token"""
    counts: IntArray
    """(sequences,) new tokens"""
    positions: IntArray
    """(sequences,) position in the sequence of the first new token"""
    block_table: IntArray
    """(sequences, most blocks) blocks of each sequence; beyond its own stands any valid block"""
    token_block: IntArray
    """(tokens,) block that each new token's key and value go to"""
    token_offset: IntArray
    """(tokens,) and place in it"""
    cache: dict[Any, Any] = field(default_factory=dict)
    """What the first layer makes of this for all layers."""

    @property
    def num_decodes(self) -> int:
        return int((self.counts == 1).sum())

    def on_device(self, block_size: int, device: torch.device) -> DeviceStep:
        """The same for a kernel on a GPU; made once for all layers that live there."""
        found: DeviceStep | None = self.cache.get(device)
        if found is None:
            slots = self.token_block * block_size + self.token_offset
            arrays = (self.starts, self.counts, self.positions, self.block_table, slots)
            found = self.cache[device] = DeviceStep.of(*arrays, device)
        return found


@dataclass(frozen=True, slots=True)
class LayerShape:
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float = 1.0
    softcap: float | None = None
    window: int | None = None
    has_sinks: bool = False

    @property
    def padded_dims(self) -> tuple[int, int]:
        """Of keys and values in the pages of the kernel for CPUs (see attention.h)."""
        return -(-self.key_dim // 2) * 2, -(-self.value_dim // LANES) * LANES

    def like(self) -> LayerShape:
        """The same without a window: what differs between the layers of one model."""
        return dataclasses.replace(self, window=None)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Arguments of one layer's call of the attention function."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    window: int | None
    softcap: float | None
    has_sinks: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the call, besides sinks."""
        return {"scaling": self.scaling, "sliding_window": self.window, "softcap": self.softcap}


class PagedAttention:
    """Holds the pages of all layers, each layer's where it computes. The runner sets `context` before each forward
    pass.

    While `context` is None it only takes down what the layers ask for (`shapes`), and where (`devices`): that is how
    the runner learns what a model needs before the pages are made.
    """

    def __init__(self) -> None:
        self.context: AttentionMetadata | DeviceStep | None = None
        self.shapes: dict[int, LayerShape] = {}
        self.devices: dict[int, torch.device] = {}
        self.block_size = 0
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._kernel: PagedAttentionKernel | None = None
        """for the layers on the CPU"""
        self._gpu_kernels: dict[torch.device, TritonPagedAttention | None] = {}
        self._recorded: list[AttentionCall] | None = None

    @contextmanager
    def recorded(self) -> Iterator[list[AttentionCall]]:
        """Collect the calls inside the block in place of computing attention."""
        context, self.context = self.context, None
        calls: list[AttentionCall] = []
        self._recorded = calls
        try:
            yield calls
        finally:
            self.context, self._recorded = context, None

    @property
    def takes_device_steps(self) -> bool:
        """Whether `context` may be a DeviceStep, all of whose arrays are on the one device of all layers."""
        return len(self._gpu_kernels) == 1 and None not in self._gpu_kernels.values()

    def shapes_on(self, device: torch.device) -> list[LayerShape]:
        """Of the layers that live there."""
        return [shape for layer, shape in self.shapes.items() if self.devices[layer] == device]

    def bytes_per_token(self, dtype: torch.dtype, device: torch.device) -> int:
        """Of the pages on the device; with the padding of the kernel for CPUs, whether it will be used or not."""
        elements = sum(shape.num_kv_heads * sum(shape.padded_dims) for shape in self.shapes_on(device))
        size: int = dtype.itemsize
        return elements * size

    def has_kernel(self, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `allocate` will find one there; attention in torch operations takes memory for what it gathers."""
        shapes = self.shapes_on(device)
        return (
            _find_gpu_kernel(shapes, dtype, device) is not None
            or _find_kernel(shapes, block_size, dtype, device) is not None
        )

    def allocate(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device, *, use_kernel: bool = True
    ) -> None:
        """Make the pages: keys (blocks, KV heads, key dim, block size), values (blocks, KV heads, block size, value
        dim). The Triton kernel has keys as it has values; the kernel for CPUs has an order of its own, and pads.

        `device`: of the layers of which none is known."""
        self.block_size = block_size
        self.devices = {layer: self.devices.get(layer, device) for layer in self.shapes}
        self._kernel, self._gpu_kernels = None, {}
        for where in dict.fromkeys(self.devices.values()):
            shapes = self.shapes_on(where)
            gpu_kernel = _find_gpu_kernel(shapes, dtype, where) if use_kernel else None
            self._gpu_kernels[where] = gpu_kernel
            if use_kernel and gpu_kernel is None and where.type == "cpu":
                self._kernel = _find_kernel(shapes, block_size, dtype, where)
        for layer, shape in self.shapes.items():
            where = self.devices[layer]
            padded = self._kernel is not None and where.type == "cpu"
            key_dim, value_dim = shape.padded_dims if padded else (shape.key_dim, shape.value_dim)
            side_by_side = (key_dim, block_size) if self._gpu_kernels[where] is None else (block_size, key_dim)
            keys = _zeros((num_blocks, shape.num_kv_heads, *side_by_side), dtype, where)
            values = _zeros((num_blocks, shape.num_kv_heads, block_size, value_dim), dtype, where)
            self._pages[layer] = (keys, values)

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
        value dim)."""
        layer: int = module.layer_idx
        context = self.context
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        if context is None:
            self.shapes[layer] = LayerShape(
                query.shape[1], key.shape[1], key.shape[-1], value.shape[-1],
                scaling, softcap, sliding_window, has_sinks=s_aux is not None,
            )  # fmt: skip
            self.devices[layer] = query.device
            if self._recorded is not None:
                call = AttentionCall(
                    module, query, key, value, scaling, sliding_window, softcap, has_sinks=s_aux is not None
                )
                self._recorded.append(call)
            # Any numbers but zeros: these would hide what a layer does with them.
            shape = (1, query.shape[2], query.shape[1], value.shape[-1])
            size = math.prod(shape)
            return torch.arange(size, device=query.device).sin().to(query.dtype).view(shape), None
        keys, values = self._pages[layer]
        new = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
        gpu_kernel = self._gpu_kernels[self.devices[layer]]
        if gpu_kernel is not None:
            on_device = context if isinstance(context, DeviceStep) else context.on_device(keys.shape[2], query.device)
            out = gpu_kernel(
                on_device, *new, keys, values, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux
            )
        elif isinstance(context, DeviceStep):
            raise TypeError("only the kernel for GPUs takes a DeviceStep")
        elif self._kernel is not None and self.devices[layer].type == "cpu":
            step = self.kernel_step(context, query.shape[1] // key.shape[1])
            out = self._kernel(
                step, *new, keys, values, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux
            )
        else:
            out = _attend_with_torch(context, *new, keys, values, _Attend(scaling, softcap, s_aux), sliding_window)
        return out.unsqueeze(0), None

    @property
    def uses_kernel(self) -> bool:
        """Whether the kernel for CPUs computes all layers."""
        return self._kernel is not None and all(device.type == "cpu" for device in self.devices.values())

    def pages(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, in the layers' order."""
        return [self._pages[layer] for layer in sorted(self._pages)]

    def kernel_step(self, context: AttentionMetadata, group: int) -> KernelStep:
        """The context as the kernel for CPUs takes it, for `group` query heads to a KV head; made once for all
        layers."""
        found: KernelStep | None = context.cache.get(group)
        if found is None:
            if self._kernel is None:
                raise RuntimeError("this attention has no kernel")
            found = self._kernel.make_step(
                context.starts,
                context.counts,
                context.positions,
                context.block_table,
                context.token_block,
                context.token_offset,
                group,
            )
            context.cache[group] = found
        return found


def _find_gpu_kernel(
    shapes: Iterable[LayerShape], dtype: torch.dtype, device: torch.device
) -> TritonPagedAttention | None:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from fastserve.engine.kernels.triton_attention import TritonPagedAttention

    fits = all(
        TritonPagedAttention.supports(dtype, shape.num_heads // shape.num_kv_heads, shape.key_dim, shape.value_dim)
        for shape in shapes
    )
    return TritonPagedAttention(device) if fits else None


def _find_kernel(
    shapes: Iterable[LayerShape], block_size: int, dtype: torch.dtype, device: torch.device
) -> PagedAttentionKernel | None:
    kernel = PagedAttentionKernel.load(dtype) if device.type == "cpu" else None
    if kernel is None:
        return None
    fits = all(
        kernel.supports(block_size, shape.num_heads // shape.num_kv_heads, shape.key_dim, shape.value_dim)
        for shape in shapes
    )
    return kernel if fits else None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU, numpy's zeros come from the kernel as untouched pages: the memory is taken when it is written, not now,
    as with torch's."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


# ---- attention in torch operations ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Places:
    """The context as tensors on the device."""

    token_block: torch.Tensor
    token_offset: torch.Tensor
    block_table: torch.Tensor
    contexts: torch.Tensor
    """(sequences,) tokens in each context, the new ones included"""

    @classmethod
    def of(cls, context: AttentionMetadata, device: torch.device) -> _Places:
        arrays = (context.token_block, context.token_offset, context.block_table, context.positions + context.counts)
        return cls(*(torch.from_numpy(array.astype(np.int64)).to(device) for array in arrays))


def _attend_with_torch(
    context: AttentionMetadata,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attend: _Attend,
    window: int | None,
) -> torch.Tensor:
    """Shapes as for the kernel. The decoding sequences are padded batches, each chunk is a batch of its own."""
    places: _Places | None = context.cache.get(("places", query.device))
    if places is None:
        places = context.cache["places", query.device] = _Places.of(context, query.device)
    keys[places.token_block, :, :, places.token_offset] = key
    values[places.token_block, :, places.token_offset] = value
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    count = context.num_decodes
    for group in _groups(context, count):
        which = torch.from_numpy(group).to(query.device)
        longest = int(context.positions[group].max()) + 1
        mask = _mask(context, places, which, 1, longest, window)
        blocks = places.block_table[which, : -(-longest // keys.shape[3])]
        out[which] = attend(query[which].unsqueeze(1), *_gather(keys, values, blocks, mask), mask).squeeze(1)
    for index in range(count, len(context.counts)):
        start, rows = int(context.starts[index]), int(context.counts[index])
        length = int(context.positions[index]) + rows
        which = torch.tensor([index], device=query.device)
        mask = _mask(context, places, which, rows, length, window)
        blocks = places.block_table[which, : -(-length // keys.shape[3])]
        part = slice(start, start + rows)
        out[part] = attend(query[part].unsqueeze(0), *_gather(keys, values, blocks, mask), mask).squeeze(0)
    return out


def _groups(context: AttentionMetadata, count: int) -> list[npt.NDArray[np.int64]]:
    """The decoding sequences in groups of similar length, so that padding to the longest stays bounded."""
    groups: list[list[int]] = []
    width = 0
    for index in np.argsort(-context.positions[:count], kind="stable").tolist():
        if not groups or (len(groups[-1]) + 1) * width > _MOST_GATHERED_TOKENS:
            groups.append([])
            width = int(context.positions[index]) + 1
        groups[-1].append(index)
    return [np.array(group) for group in groups]


def _gather(
    keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of `blocks` (batch, blocks) as keys and values (batch, KV heads, length, dim), zero where no row may look:
    whatever a block held before, such as the NaN of another request, is not multiplied by 0 but gone."""
    length = mask.shape[3]
    seen = mask.any(dim=2).unsqueeze(3)
    found_keys = keys[blocks].permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :length]
    found_values = values[blocks].transpose(1, 2).flatten(2, 3)[:, :, :length]
    return found_keys.masked_fill(~seen, 0), found_values.masked_fill(~seen, 0)


def _mask(
    context: AttentionMetadata, places: _Places, which: torch.Tensor, rows: int, length: int, window: int | None
) -> torch.Tensor:
    """(batch, 1, rows, length) for sequences with equally many new tokens: True where a row may look."""
    device = places.contexts.device
    key = (device, int(which[0]), rows, length, window)
    found: torch.Tensor | None = context.cache.get(key)
    if found is None:
        back = torch.arange(rows - 1, -1, -1, device=device)
        row = (places.contexts[which].unsqueeze(1) - 1 - back).unsqueeze(2)
        place = torch.arange(length, device=device)
        found = place <= row
        if window is not None:
            found &= place > row - window
        found = context.cache[key] = found.unsqueeze(1)
    return found


@dataclass(frozen=True, slots=True)
class _Attend:
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """`query` (batch, rows, heads, dim), `keys` and `values` (batch, KV heads, context, dim), `mask` (batch, 1,
        rows, context), True where a row may look -> (batch, rows, heads, value dim)."""
        batch, rows, heads, _ = query.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        # The query heads that share a KV head become further rows of it: no copy of keys and values for each of them.
        folded = query.reshape(batch, rows, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = mask.expand(-1, group, -1, -1).flatten(1, 2).unsqueeze(1)
        if self.softcap is None and self.sinks is None:
            out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=self.scaling)
        else:
            out = self._explicit(folded, keys, values, mask, rows)
        return out.unflatten(2, (group, rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _explicit(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, rows: int
    ) -> torch.Tensor:
        scores = (query @ keys.transpose(-1, -2)).float() * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~mask, float("-inf"))
        if self.sinks is not None:
            # A learned logit for each head that takes part in the softmax and stands for no token (GPT-OSS).
            kv_heads = keys.shape[1]
            sinks = self.sinks.float().view(1, kv_heads, -1, 1).expand(scores.shape[0], -1, -1, rows)
            scores = torch.cat([scores, sinks.reshape(scores.shape[0], kv_heads, -1, 1)], dim=-1)
            return (scores.softmax(dim=-1)[..., :-1].to(values.dtype)) @ values
        return scores.softmax(dim=-1).to(values.dtype) @ values
