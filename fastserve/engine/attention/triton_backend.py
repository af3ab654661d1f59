"""Paged attention by our Triton kernel. This module needs the package triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.attention.backend import KVCache, StepSize
from fastserve.engine.attention.metadata import AttentionMetadata, AttentionParams, LayerShape
from fastserve.engine.kernels.device_step import DeviceStep, Send
from fastserve.engine.kernels.triton_attention import TritonPagedAttention


class TritonAttention:
    takes_device_steps = True

    def __init__(self, device: torch.device, dtype: torch.dtype, block_size: int, send: Send) -> None:
        """`send` copies arrays to the device."""
        self._kernel = TritonPagedAttention(device)
        self._device = device
        self._dtype = dtype
        self._block_size = block_size
        self._send = send

    @staticmethod
    def supports(shapes: Sequence[LayerShape], dtype: torch.dtype) -> bool:
        return all(
            TritonPagedAttention.supports(dtype, shape.num_heads // shape.num_kv_heads, shape.key_dim, shape.value_dim)
            for shape in shapes
        )

    def make_cache(self, shape: LayerShape, num_blocks: int) -> KVCache:
        """Keys and values (blocks, KV heads, block size, dim)."""
        keys = (num_blocks, shape.num_kv_heads, self._block_size, shape.key_dim)
        values = (num_blocks, shape.num_kv_heads, self._block_size, shape.value_dim)
        return self._zeros(keys), self._zeros(values)

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def bytes_per_token(self, shape: LayerShape) -> int:
        size: int = shape.num_kv_heads * (shape.key_dim + shape.value_dim) * self._dtype.itemsize
        return size

    def workspace_bytes(self, shapes: Sequence[LayerShape], size: StepSize) -> int:
        return 0

    def __call__(
        self,
        step: AttentionMetadata | DeviceStep,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: KVCache,
        params: AttentionParams,
    ) -> torch.Tensor:
        return self._kernel(
            step if isinstance(step, DeviceStep) else self._device_step(step), query, key, value, *cache,
            scaling=params.scaling, window=params.window, chunk=params.chunk, softcap=params.softcap,
            sinks=params.sinks,
        )  # fmt: skip

    def _device_step(self, metadata: AttentionMetadata) -> DeviceStep:
        """The metadata on the device, copied once for all layers."""
        found: DeviceStep | None = metadata.cache.get(self._device)
        if found is None:
            slots = metadata.token_block * self._block_size + metadata.token_offset
            arrays = (metadata.starts, metadata.counts, metadata.positions, metadata.block_table, slots)
            found = metadata.cache[self._device] = DeviceStep.of(*arrays, self._send)
        return found
