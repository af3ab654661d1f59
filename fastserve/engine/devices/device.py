"""The contract of a device: all that the engine asks of the hardware that it runs on.

A new accelerator is one more file in this folder, named after its type in torch, with a subclass of `Device` called
`DEVICE`. What it does not override is done by plain torch operations, which are right on any device.
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
from fastserve.engine.kernels.quantized_matmul import QuantizedMatmul
from fastserve.engine.memory import FreeMemory

Arrays = Sequence[npt.NDArray[Any]]
_ALIGNMENT = 16
"""Arrays of a packed transfer begin at multiples of so many bytes: Triton compiles once for aligned addresses."""


class Recorder(Protocol):
    """Makes a function over fixed buffers repeatable (a CUDA graph)."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that does the same as `run` again, on the same memory. `run` may be called several times
        meanwhile. Raises RuntimeError when it cannot be recorded, such as when it waits for the device."""
        ...


class Event(Protocol):
    """A point in the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has come there."""
        ...


class Device(ABC):
    """One device, such as cuda:0."""

    rank: ClassVar[int] = 50
    """Of the devices that are there, the one of the lowest rank is taken when the user names none."""
    max_batched_tokens: ClassVar[int] = 2048
    """The token budget of a step, by default: as few as still make full use of the device, since all answers wait for
    a step to end."""
    kv_cache_share: ClassVar[float] = 1.0
    """Share of the allowed memory that the KV cache may take."""
    holds_books: ClassVar[bool] = False
    """Whether what the engine notes about requests and blocks lies in this device's memory."""
    packs_weights: ClassVar[bool] = False
    """Whether products are faster with weights in an order of their own, also those of single experts."""
    runs_ahead: ClassVar[bool] = False
    """Whether the host may plan and launch a step while the device still computes the last one."""
    pins_memory: ClassVar[bool] = False
    """Whether transfers from page-locked memory go on beside the host."""
    has_float64: bool = True

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    @classmethod
    def is_available(cls) -> bool:
        """Whether this machine and this build of torch have one."""
        return True

    @classmethod
    def count(cls) -> int:
        """Devices of this kind over which a model can be spread."""
        return 1

    # ---- memory -------------------------------------------------------------------------------------------------

    @abstractmethod
    def free_memory(self) -> FreeMemory: ...

    def total_memory(self) -> int | None:
        """Bytes; None where shares of memory are meant of what is free."""
        return None

    def allowed_bytes(self, free: FreeMemory, utilization: float) -> int:
        """What may be taken of the free memory, when `utilization` is the share of the device that may be in use,
        others' part of it included."""
        total = self.total_memory()
        if total is None:
            return int(free.num_bytes * utilization)
        return max(0, int(free.num_bytes - (1 - utilization) * total))

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    # ---- computing ----------------------------------------------------------------------------------------------

    def default_dtype(self, stored: torch.dtype | None) -> torch.dtype:
        """For a checkpoint in `stored`, when the user names none."""
        return stored if stored in (torch.float16, torch.bfloat16) else torch.float16

    def attention_backend(self, shapes: Sequence[LayerShape], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        """Who computes attention of these layers."""
        return TorchAttention(dtype, block_size, self.zeros)

    def elementwise_ops(self, dtype: torch.dtype) -> ElementwiseOps | None:
        """None where the model's own code does them."""
        return None

    def quantized_matmul(self) -> QuantizedMatmul | None:
        """None where weights are dequantized for each product."""
        return None

    @property
    def prefers_bitsandbytes(self) -> bool:
        """Whether bitsandbytes is there and faster than our own weights of 4 bits."""
        return False

    def graph_recorder(self) -> Recorder | None:
        """None where steps cannot be recorded."""
        return None

    def make_current(self) -> None:  # noqa: B027  # few devices know a current one
        """Kernels that are launched from now on run here."""

    def current(self) -> AbstractContextManager[object]:
        """Kernels that are launched inside the block run here."""
        return contextlib.nullcontext()

    # ---- transfers ----------------------------------------------------------------------------------------------

    def send(self, arrays: Arrays) -> list[torch.Tensor]:
        """The arrays on the device, in one transfer that the host does not wait for."""
        if not arrays:
            return []
        # Pinned memory of torch's own cache is not given out again before the transfer from it is done.
        packed = pack(arrays, pinned=self.pins_memory)
        return unpack(packed.to(self.torch_device, non_blocking=True), arrays)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host. With `event`, it holds once the event that was made next has been waited for."""
        return tensor.cpu()

    def event(self) -> Event | None:
        """The end of the work that was launched so far; None where `fetch` waits for it."""
        return None

    @property
    def profiler_activity(self) -> ProfilerActivity | None:
        """What torch's profiler records of the device, beside the host."""
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
    """Views of what was packed, in the shapes and dtypes of `arrays`."""
    found = []
    begin = 0
    for array in arrays:
        part = packed[begin : begin + array.nbytes]
        found.append(part.view(torch.from_numpy(array).dtype).view(array.shape))
        begin += _aligned_bytes(array)
    return found


def _aligned_bytes(array: npt.NDArray[Any]) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
