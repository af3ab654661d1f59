"""Paged attention by our C++ kernel for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.attention.backend import KVCache, StepSize
from fastserve.engine.attention.metadata import AttentionMetadata, AttentionParams, LayerShape
from fastserve.engine.huge_pages import untouched_zeros
from fastserve.engine.kernels.device_step import DeviceStep
from fastserve.engine.kernels.paged_attention import LANES, KernelStep, PagedAttentionKernel


class CpuAttention:
    takes_device_steps = False

    def __init__(self, kernel: PagedAttentionKernel, dtype: torch.dtype, block_size: int) -> None:
        self._kernel = kernel
        self._dtype = dtype
        self.block_size = block_size

    @classmethod
    def find(cls, shapes: Sequence[LayerShape], dtype: torch.dtype, block_size: int) -> CpuAttention | None:
        """The backend, or None where there is no kernel for these layers."""
        kernel = PagedAttentionKernel.load(dtype)
        if kernel is None or not all(
            kernel.supports(block_size, shape.num_heads // shape.num_kv_heads, shape.key_dim, shape.value_dim)
            for shape in shapes
        ):
            return None
        return cls(kernel, dtype, block_size)

    def make_cache(self, shape: LayerShape, num_blocks: int) -> KVCache:
        """Keys (blocks, KV heads, key dim, block size), values (blocks, KV heads, block size, value dim), both dims
        padded and in the layout of attention.h."""
        key_dim, value_dim = _padded_dims(shape)
        keys = untouched_zeros((num_blocks, shape.num_kv_heads, key_dim, self.block_size), self._dtype)
        values = untouched_zeros((num_blocks, shape.num_kv_heads, self.block_size, value_dim), self._dtype)
        return keys, values

    def bytes_per_token(self, shape: LayerShape) -> int:
        size: int = shape.num_kv_heads * sum(_padded_dims(shape)) * self._dtype.itemsize
        return size

    def workspace_bytes(self, shapes: Sequence[LayerShape], size: StepSize) -> int:
        return 0

    def kernel_step(self, metadata: AttentionMetadata, group: int) -> KernelStep:
        """The kernel's form of the metadata, for `group` query heads per KV head; computed once for all layers."""
        found: KernelStep | None = metadata.cache.get(group)
        if found is None:
            found = metadata.cache[group] = self._kernel.make_step(
                metadata.starts,
                metadata.counts,
                metadata.positions,
                metadata.block_table,
                metadata.token_block,
                metadata.token_offset,
                group,
            )
        return found

    def __call__(
        self,
        step: AttentionMetadata | DeviceStep,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: KVCache,
        params: AttentionParams,
    ) -> torch.Tensor:
        if isinstance(step, DeviceStep):
            raise TypeError("the kernel for CPUs takes no DeviceStep")
        return self._kernel(
            self.kernel_step(step, query.shape[1] // key.shape[1]), query, key, value, *cache,
            scaling=params.scaling, window=params.window, chunk=params.chunk, softcap=params.softcap,
            sinks=params.sinks,
        )  # fmt: skip


def _padded_dims(shape: LayerShape) -> tuple[int, int]:
    """Padded key dim and value dim in the KV cache (see attention.h)."""
    return -(-shape.key_dim // 2) * 2, -(-shape.value_dim // LANES) * LANES
