"""The contract of a device: everything that the engine needs from the hardware it runs on.

A new accelerator is one more file in this folder, named after its type in torch, with a subclass of `Device` called
`DEVICE`. Methods that it does not override use plain torch operations, which work on any device.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import ProfilerActivity

from fastserve.engine.attention.backend import AttentionBackend
from fastserve.engine.attention.metadata import LayerShape
from fastserve.engine.attention.torch_backend import TorchAttention
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps
from fastserve.engine.kernels.lora import LoraKernel
from fastserve.engine.kernels.quantized_matmul import QuantizedMatmul
from fastserve.engine.memory import FreeMemory

Arrays = Sequence[npt.NDArray[Any]]
_ALIGNMENT = 16
"""Alignment in bytes of arrays in a packed transfer: Triton compiles once for aligned addresses."""


class Recorder(Protocol):
    """Captures functions as graphs that can be replayed (CUDA graphs)."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that replays `run` on the same memory. `run` may be called several times to record it. Raises
        RuntimeError when it cannot be recorded, such as when it waits for the device."""
        ...


class Event(Protocol):
    """A point in the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""
        ...


class Device(ABC):
    """One device, such as cuda:0."""

    rank: ClassVar[int] = 50
    """When the user names no device, the available one of the lowest rank is used."""
    max_batched_tokens: ClassVar[int] = 2048
    """Default token budget of a step: the fewest that make full use of the device, since all requests wait for a step
    to end."""
    kv_cache_share: ClassVar[float] = 1.0
    """Share of the allowed memory that the KV cache may take."""
    holds_host_state: ClassVar[bool] = False
    """Whether the engine's state about requests and blocks is in this device's memory."""
    packs_weights: ClassVar[bool] = False
    """Whether matrix products are faster with weights in a packed layout, also those of single experts."""
    runs_ahead: ClassVar[bool] = False
    """Whether the host may plan and launch a step while the device still computes the last one."""
    compiles_in_steps: ClassVar[bool] = True
    """Whether a step may compile kernels: seconds that one rank takes and another, with a warm cache, does not."""
    pins_memory: ClassVar[bool] = False
    """Whether transfers from pinned memory are asynchronous."""
    has_float64: bool = True

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    @classmethod
    def is_available(cls) -> bool:
        """Whether this machine and this build of torch have one."""
        return True

    @classmethod
    def count(cls) -> int:
        """Number of devices of this kind over which a model can be spread."""
        return 1

    # ---- memory -------------------------------------------------------------------------------------------------

    @abstractmethod
    def free_memory(self) -> FreeMemory: ...

    def total_memory(self) -> int | None:
        """Bytes; None where memory utilization is a share of the free memory."""
        return None

    def allowed_bytes(self, free: FreeMemory, utilization: float) -> int:
        """Bytes of the free memory that may be used, so that at most the share `utilization` of the device is in use,
        other processes included."""
        total = self.total_memory()
        if total is None:
            return int(free.num_bytes * utilization)
        return max(0, int(free.num_bytes - (1 - utilization) * total))

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    # ---- computing ----------------------------------------------------------------------------------------------

    def default_dtype(self, stored: torch.dtype | None) -> torch.dtype:
        """The dtype for a checkpoint stored in `stored`, when the user names none."""
        return stored if stored in (torch.float16, torch.bfloat16) else torch.float16

    def attention_backend(self, shapes: Sequence[LayerShape], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        """The attention backend for these layers."""
        return TorchAttention(dtype, block_size, self.zeros)

    def elementwise_ops(self, dtype: torch.dtype) -> ElementwiseOps | None:
        """Fused elementwise operations; None: the model's own code is used."""
        return None

    def quantized_matmul(self) -> QuantizedMatmul | None:
        """Kernel for quantized weights; None: weights are dequantized for each product."""
        return None

    def lora_kernel(self, dtype: torch.dtype) -> LoraKernel | None:
        """Kernel for the adapters of a batch; None: their products are torch's, one adapter after the other."""
        return None

    @property
    def prefers_bitsandbytes(self) -> bool:
        """Whether bitsandbytes is installed and faster than our own 4-bit weights."""
        return False

    def graph_recorder(self) -> Recorder | None:
        """None: steps cannot be recorded."""
        return None

    def make_current(self) -> None:  # noqa: B027  # few kinds have a current device
        """Make this the device on which kernels launched from now on run."""

    def current(self) -> AbstractContextManager[object]:
        """Make this the current device within the block."""
        return contextlib.nullcontext()

    # ---- transfers ----------------------------------------------------------------------------------------------

    def send(self, arrays: Arrays) -> list[torch.Tensor]:
        """Copy the arrays to the device, in one asynchronous transfer."""
        if not arrays:
            return []
        # torch's allocator does not reuse pinned memory before the transfer from it is done.
        packed = pack(arrays, pinned=self.pins_memory)
        return unpack(packed.to(self.torch_device, non_blocking=True), arrays)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host. Where `event` is not None, it is complete once the next event has been reached."""
        return tensor.cpu()

    def event(self) -> Event | None:
        """The end of the work launched so far; None where `fetch` waits for it."""
        return None

    @property
    def profiler_activity(self) -> ProfilerActivity | None:
        """Activity that torch's profiler records in addition to the host's."""
        return None


def pack(arrays: Arrays, *, pinned: bool) -> torch.Tensor:
    """All bytes of the arrays, each aligned."""
    packed = torch.empty(sum(_aligned_bytes(array) for array in arrays), dtype=torch.uint8, pin_memory=pinned)
    target = packed.numpy()
    begin = 0
    for array in arrays:
        target[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        begin += _aligned_bytes(array)
    return packed


def unpack(packed: torch.Tensor, arrays: Arrays) -> list[torch.Tensor]:
    """Views of the packed arrays, in the shapes and dtypes of `arrays`."""
    found = []
    begin = 0
    for array in arrays:
        part = packed[begin : begin + array.nbytes]
        found.append(part.view(torch.from_numpy(array).dtype).view(array.shape))
        begin += _aligned_bytes(array)
    return found


def _aligned_bytes(array: npt.NDArray[Any]) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
