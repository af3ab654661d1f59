"""Paged attention behind transformers' attention interface.

transformers' own model code calls it layer by layer with one packed batch: the new tokens of all sequences of the
step, one after the other. It stores their keys and values in the pages, and lets every token look at its sequence's
pages only. This is the form in plain torch operations, for any device; the batch is laid out so that a kernel can take
its place: first `num_decodes` sequences of one token each, then the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """A sequence with several new tokens: rows [start, start + count) of the batch, the last of them at position
    context - 1 of the sequence."""

    start: int
    count: int
    context: int
    slots: torch.Tensor
    """(context,) where the sequence's tokens lie in the pages"""


@dataclass(slots=True)
class StepContext:
    """Where the tokens of a step lie."""

    slots: torch.Tensor
    """(tokens,) where each new token's key and value go: block id * block size + offset"""
    num_decodes: int
    decode_slots: torch.Tensor
    """(num_decodes, longest context) slots of each decoding sequence's tokens; padded with any valid slot"""
    decode_contexts: torch.Tensor
    """(num_decodes,) tokens in each context, the new one included"""
    chunks: list[ChunkSpan]
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    """Made by the first layer that needs it, used by all: (-1 or index of chunk, window) -> mask"""


@dataclass(frozen=True, slots=True)
class LayerShape:
    num_kv_heads: int
    key_dim: int
    value_dim: int


class PagedAttention:
    """Holds the pages of all layers. The runner sets `context` before each forward pass.

    While `context` is None it only takes down the shapes that the layers ask for (`shapes`) and returns zeros: that is
    how the runner learns what a model needs before the pages are made.
    """

    def __init__(self) -> None:
        self.context: StepContext | None = None
        self.shapes: dict[int, LayerShape] = {}
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        elements = sum(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in self.shapes.values())
        size: int = dtype.itemsize
        return elements * size

    def allocate(self, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the pages. Zeroed, because masked values are multiplied by 0, and 0 times garbage may be NaN; on the
        CPU the memory is not really taken before it is written."""
        for layer, shape in self.shapes.items():
            keys = torch.zeros(num_slots, shape.num_kv_heads, shape.key_dim, dtype=dtype, device=device)
            values = torch.zeros(num_slots, shape.num_kv_heads, shape.value_dim, dtype=dtype, device=device)
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
        tokens, heads = query.shape[2], query.shape[1]
        out = query.new_zeros(tokens, heads, value.shape[-1])
        context = self.context
        if context is None:
            self.shapes[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
            return out.unsqueeze(0), None
        keys, values = self._pages[layer]
        keys.index_copy_(0, context.slots, key[0].transpose(0, 1))
        values.index_copy_(0, context.slots, value[0].transpose(0, 1))
        rows = query[0].transpose(0, 1)
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        attend = _Attend(scaling, softcap, s_aux)
        count = context.num_decodes
        if count:
            mask = self._decode_mask(context, sliding_window)
            out[:count] = attend(
                rows[:count].unsqueeze(1), keys[context.decode_slots], values[context.decode_slots], mask
            ).squeeze(1)
        for index, span in enumerate(context.chunks):
            part = slice(span.start, span.start + span.count)
            mask = self._chunk_mask(context, index, sliding_window)
            out[part] = attend(
                rows[part].unsqueeze(0), keys[span.slots].unsqueeze(0), values[span.slots].unsqueeze(0), mask
            ).squeeze(0)
        return out.unsqueeze(0), None

    def _decode_mask(self, context: StepContext, window: int | None) -> torch.Tensor:
        found = context.masks.get((-1, window))
        if found is None:
            place = torch.arange(context.decode_slots.shape[1], device=context.slots.device)
            last = context.decode_contexts.unsqueeze(1)
            found = place < last
            if window is not None:
                found &= place >= last - window
            found = found[:, None, None, :]
            context.masks[-1, window] = found
        return found

    def _chunk_mask(self, context: StepContext, index: int, window: int | None) -> torch.Tensor:
        found = context.masks.get((index, window))
        if found is None:
            span = context.chunks[index]
            device = context.slots.device
            row = torch.arange(span.context - span.count, span.context, device=device).unsqueeze(1)
            place = torch.arange(span.context, device=device)
            found = place <= row
            if window is not None:
                found &= place > row - window
            found = found[None, None]
            context.masks[index, window] = found
        return found


@dataclass(frozen=True, slots=True)
class _Attend:
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """`query` (batch, rows, heads, dim), `keys` and `values` (batch, context, KV heads, dim), `mask` (batch or 1,
        1, rows, context), True where a row may look -> (batch, rows, heads, value dim)."""
        batch, rows, heads, _ = query.shape
        kv_heads = keys.shape[2]
        group = heads // kv_heads
        # The query heads that share a KV head become further rows of it: no copy of keys and values for each of them.
        folded = query.reshape(batch, rows, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = mask.expand(-1, group, -1, -1).flatten(1, 2).unsqueeze(1)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
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
