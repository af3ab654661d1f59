"""NVIDIA GPUs, and AMD GPUs through ROCm, with our Triton kernels where the package triton is found."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from fastserve.engine.attention.backend import AttentionBackend
from fastserve.engine.attention.metadata import LayerShape
from fastserve.engine.devices.device import Device, Event, Recorder
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps
from fastserve.engine.kernels.lora import LoraKernel
from fastserve.engine.kernels.quantized_matmul import QuantizedMatmul
from fastserve.engine.memory import FreeMemory


class CudaDevice(Device):
    rank = 0
    runs_ahead = True
    pins_memory = True

    @classmethod
    def is_available(cls) -> bool:
        return bool(torch.cuda.is_available())

    @classmethod
    def count(cls) -> int:
        return int(torch.cuda.device_count())

    def free_memory(self) -> FreeMemory:
        return FreeMemory(torch.cuda.mem_get_info(self.torch_device)[0], f"on the GPU {self.torch_device}")

    def total_memory(self) -> int | None:
        return int(torch.cuda.mem_get_info(self.torch_device)[1])

    # Triton is imported only where it is used: that takes a second, and without it torch operations are used.

    def attention_backend(self, shapes: Sequence[LayerShape], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        if _has_triton():
            from fastserve.engine.attention.triton_backend import TritonAttention

            if TritonAttention.supports(shapes, dtype):
                return TritonAttention(self.torch_device, dtype, block_size, self.send)
        return super().attention_backend(shapes, dtype, block_size)

    def elementwise_ops(self, dtype: torch.dtype) -> ElementwiseOps | None:
        if not _has_triton():
            return None
        from fastserve.engine.kernels.triton_elementwise import TritonElementwiseKernels

        return TritonElementwiseKernels()

    def quantized_matmul(self) -> QuantizedMatmul | None:
        if not _has_triton():
            return None
        from fastserve.engine.kernels.triton_quantized import TritonQuantizedMatmul

        return TritonQuantizedMatmul()

    def lora_kernel(self, dtype: torch.dtype) -> LoraKernel | None:
        if not _has_triton():
            return None
        from fastserve.engine.kernels.triton_lora import TritonLoraKernel

        return TritonLoraKernel()

    @property
    def prefers_bitsandbytes(self) -> bool:
        return importlib.util.find_spec("bitsandbytes") is not None

    def graph_recorder(self) -> Recorder | None:
        return CudaGraphRecorder()

    def make_current(self) -> None:
        torch.cuda.set_device(self.torch_device)

    def current(self) -> AbstractContextManager[object]:
        device: AbstractContextManager[object] = torch.cuda.device(self.torch_device)
        return device

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def event(self) -> Event | None:
        event: Event = torch.cuda.current_stream(self.torch_device).record_event()
        return event

    @property
    def profiler_activity(self) -> ProfilerActivity | None:
        return ProfilerActivity.CUDA


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class CudaGraphRecorder:
    """All graphs share one memory pool, because only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        # At the first call libraries allocate workspaces and Triton compiles kernels: neither can be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            # A failed capture can leave the allocator in a bad state: operations that wait for the device are detected
            # before.
            with waiting_is_an_error():
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Make torch operations that wait for the device raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode does not detect all waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


DEVICE = CudaDevice
