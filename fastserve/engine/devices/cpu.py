"""CPUs, with our C++ kernels where a compiler is found."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.attention.backend import AttentionBackend
from fastserve.engine.attention.cpu_backend import CpuAttention
from fastserve.engine.attention.metadata import LayerShape
from fastserve.engine.devices.device import Arrays, Device
from fastserve.engine.huge_pages import untouched_zeros
from fastserve.engine.kernels.elementwise import ElementwiseKernels
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps
from fastserve.engine.kernels.lora import CpuLoraKernel, LoraKernel
from fastserve.engine.memory import FreeMemory, free_host_memory


class CpuDevice(Device):
    rank = 100
    max_batched_tokens = 256  # larger batches are no faster per token
    kv_cache_share = 0.5  # the machine's memory is shared with others
    holds_host_state = True
    packs_weights = True
    compiles_in_steps = False

    def free_memory(self) -> FreeMemory:
        return free_host_memory()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return untouched_zeros(shape, dtype)

    def default_dtype(self, stored: torch.dtype | None) -> torch.dtype:
        return torch.bfloat16 if stored is torch.bfloat16 and _multiplies_bfloat16() else torch.float32

    def attention_backend(self, shapes: Sequence[LayerShape], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        return CpuAttention.find(shapes, dtype, block_size) or super().attention_backend(shapes, dtype, block_size)

    def elementwise_ops(self, dtype: torch.dtype) -> ElementwiseOps | None:
        return ElementwiseKernels.load(dtype)

    def lora_kernel(self, dtype: torch.dtype) -> LoraKernel | None:
        return CpuLoraKernel.load(dtype)

    def send(self, arrays: Arrays) -> list[torch.Tensor]:
        """The tensors share their memory with the arrays."""
        return [torch.from_numpy(array) for array in arrays]


def _multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 instructions; without them float32 is faster, for twice the memory."""
    has_avx512, has_amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    return bool(has_avx512 or has_amx)


DEVICE = CpuDevice
