"""Paged attention in plain torch operations: slower than a kernel, but runs on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fastserve.engine.attention.backend import KVCache, StepSize
from fastserve.engine.attention.masks import CausalMask
from fastserve.engine.attention.metadata import AttentionMetadata, AttentionParams, LayerShape
from fastserve.engine.kernels.device_step import DeviceStep

Zeros = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
_MAX_GATHERED_TOKENS = 1 << 16
"""Maximum size of a padded batch of contexts, in tokens."""


class TorchAttention:
    takes_device_steps = False

    def __init__(self, dtype: torch.dtype, block_size: int, zeros: Zeros) -> None:
        """`zeros` allocates tensors on the device."""
        self._dtype = dtype
        self._block_size = block_size
        self._zeros = zeros

    def make_cache(self, shape: LayerShape, num_blocks: int) -> KVCache:
        """Keys (blocks, KV heads, key dim, block size), values (blocks, KV heads, block size, value dim)."""
        keys = (num_blocks, shape.num_kv_heads, shape.key_dim, self._block_size)
        values = (num_blocks, shape.num_kv_heads, self._block_size, shape.value_dim)
        return self._zeros(keys, self._dtype), self._zeros(values, self._dtype)

    def bytes_per_token(self, shape: LayerShape) -> int:
        size: int = shape.num_kv_heads * (shape.key_dim + shape.value_dim) * self._dtype.itemsize
        return size

    def workspace_bytes(self, shapes: Sequence[LayerShape], size: StepSize) -> int:
        """Gathered keys and values of a group of sequences, and the scores of a chunk in float32, with their mask."""
        gathered = max(size.context, min(_MAX_GATHERED_TOKENS, size.num_seqs * size.context))
        per_layer = max(map(self.bytes_per_token, shapes))
        heads = max(shape.num_heads for shape in shapes)
        scores = max(size.num_tokens * size.context, gathered) * heads * 4
        return 2 * gathered * per_layer + 3 * scores

    def __call__(
        self,
        step: AttentionMetadata | DeviceStep,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: KVCache,
        params: AttentionParams,
    ) -> torch.Tensor:
        """Decoding sequences are computed in padded batches, each chunk by itself."""
        if isinstance(step, DeviceStep):
            raise TypeError("attention in torch operations takes no DeviceStep")
        arrays: _DeviceArrays | None = step.cache.get(("arrays", query.device))
        if arrays is None:
            arrays = step.cache["arrays", query.device] = _DeviceArrays.of(step, query.device)
        keys, values = cache
        keys[arrays.token_block, :, :, arrays.token_offset] = key
        values[arrays.token_block, :, arrays.token_offset] = value
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        count = step.num_decodes
        for group in _groups(step, count):
            which = torch.from_numpy(group).to(query.device)
            longest = int(step.positions[group].max()) + 1
            mask = _mask(step, arrays, which, 1, longest, params)
            blocks = arrays.block_table[which, : -(-longest // keys.shape[3])]
            found = _attend(params, query[which].unsqueeze(1), *_gather(keys, values, blocks, mask), mask)
            out[which] = found.squeeze(1)
        for index in range(count, len(step.counts)):
            start, rows = int(step.starts[index]), int(step.counts[index])
            length = int(step.positions[index]) + rows
            which = torch.tensor([index], device=query.device)
            mask = _mask(step, arrays, which, rows, length, params)
            blocks = arrays.block_table[which, : -(-length // keys.shape[3])]
            part = slice(start, start + rows)
            found = _attend(params, query[part].unsqueeze(0), *_gather(keys, values, blocks, mask), mask)
            out[part] = found.squeeze(0)
        return out


@dataclass(frozen=True, slots=True)
class _DeviceArrays:
    """The metadata as tensors on the device."""

    token_block: torch.Tensor
    token_offset: torch.Tensor
    block_table: torch.Tensor
    contexts: torch.Tensor
    """(sequences,) tokens in each context, including the new ones"""

    @classmethod
    def of(cls, metadata: AttentionMetadata, device: torch.device) -> _DeviceArrays:
        contexts = metadata.positions + metadata.counts
        arrays = (metadata.token_block, metadata.token_offset, metadata.block_table, contexts)
        return cls(*(torch.from_numpy(array.astype(np.int64)).to(device) for array in arrays))


def _groups(metadata: AttentionMetadata, count: int) -> list[npt.NDArray[np.int64]]:
    """The decoding sequences in groups of similar length, so that padding to the longest stays bounded."""
    groups: list[list[int]] = []
    width = 0
    for index in np.argsort(-metadata.positions[:count], kind="stable").tolist():
        if not groups or (len(groups[-1]) + 1) * width > _MAX_GATHERED_TOKENS:
            groups.append([])
            width = int(metadata.positions[index]) + 1
        groups[-1].append(index)
    return [np.array(group) for group in groups]


def _gather(
    keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (batch, KV heads, length, dim) of `blocks` (batch, blocks), zero where all rows are masked.

    So stale content of a block, such as another request's NaN, cannot spread through products with 0.
    """
    length = mask.shape[3]
    seen = mask.any(dim=2).unsqueeze(3)
    found_keys = keys[blocks].permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :length]
    found_values = values[blocks].transpose(1, 2).flatten(2, 3)[:, :, :length]
    return found_keys.masked_fill(~seen, 0), found_values.masked_fill(~seen, 0)


def _mask(
    metadata: AttentionMetadata,
    arrays: _DeviceArrays,
    which: torch.Tensor,
    rows: int,
    length: int,
    params: AttentionParams,
) -> torch.Tensor:
    """Mask (batch, 1, rows, length) for sequences with equally many new tokens: True where a row attends."""
    device = arrays.contexts.device
    key = (device, int(which[0]), rows, length, params.window, params.chunk)
    found: torch.Tensor | None = metadata.cache.get(key)
    if found is None:
        back = torch.arange(rows - 1, -1, -1, device=device)
        row = (arrays.contexts[which].unsqueeze(1) - 1 - back).unsqueeze(2)
        mask = CausalMask(params.window, params.chunk)
        found = metadata.cache[key] = mask.sees(row, torch.arange(length, device=device)).unsqueeze(1)
    return found


def _attend(
    params: AttentionParams, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """`query` (batch, rows, heads, dim), `keys` and `values` (batch, KV heads, context, dim), `mask` (batch, 1,
    rows, context), True where a row attends -> (batch, rows, heads, value dim)."""
    batch, rows, heads, _ = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    # The query heads that share a KV head become rows of it, which saves copies of keys and values.
    folded = query.reshape(batch, rows, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = mask.expand(-1, group, -1, -1).flatten(1, 2).unsqueeze(1)
    if params.softcap is None and params.sinks is None:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=params.scaling)
    else:
        out = _attend_explicitly(params, folded, keys, values, mask, rows)
    return out.unflatten(2, (group, rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _attend_explicitly(
    params: AttentionParams,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    scores = (query @ keys.transpose(-1, -2)).float() * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if params.sinks is not None:
        kv_heads = keys.shape[1]
        sinks = params.sinks.float().view(1, kv_heads, -1, 1).expand(scores.shape[0], -1, -1, rows)
        scores = torch.cat([scores, sinks.reshape(scores.shape[0], kv_heads, -1, 1)], dim=-1)
        return (scores.softmax(dim=-1)[..., :-1].to(values.dtype)) @ values
    return scores.softmax(dim=-1).to(values.dtype) @ values
