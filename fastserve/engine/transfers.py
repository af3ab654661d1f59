"""Arrays on their way to a device and results on their way back, neither of which the host waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16
"""Arrays of a packed transfer begin at multiples of so many bytes: Triton compiles once for aligned addresses."""


Arrays = Sequence[npt.NDArray[Any]]


def to_device(arrays: Arrays, device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in one transfer. On a CPU they share their memory with the tensors."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    if not arrays:
        return []
    # Pinned memory of torch's own cache is not given out again before the transfer from it is done.
    packed = pack(arrays, pinned=device.type == "cuda")
    return unpack(packed.to(device, non_blocking=True), arrays)


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


class Readback:
    """Tensors that follow the work that makes them to the host.

    `take` what is wanted, then `close`; what was taken holds once `wait` has returned. Only CUDA goes on meanwhile.
    """

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._event: Any = None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where the tensor will stand on the host."""
        if tensor.device.type != "cuda":
            return tensor.cpu()
        self._device = tensor.device
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def close(self) -> None:
        if self._device is not None:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
