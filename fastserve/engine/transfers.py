"""Arrays on their way to a device and results on their way back, neither of which the host waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16
"""Arrays of a packed transfer begin at multiples of so many bytes: Triton compiles once for aligned addresses."""


def to_device(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in one transfer. On a CPU they share their memory with the tensors."""
    if not arrays:
        return []
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    begins: list[int] = []
    size = 0
    for array in arrays:
        begins.append(size)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    # Pinned memory of torch's own cache is not given out again before the transfer from it is done.
    staging = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    packed = staging.numpy()
    for begin, array in zip(begins, arrays, strict=True):
        packed[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = staging.to(device, non_blocking=True)
    return [
        moved[begin : begin + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for begin, array in zip(begins, arrays, strict=True)
    ]


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
