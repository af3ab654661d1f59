"""Asynchronous transfers of arrays to a device, and of results back to the host."""

from __future__ import annotations

import torch

from fastserve.engine.devices.device import Arrays, Device, Event
from fastserve.engine.devices.find import device_of


def to_device(arrays: Arrays, device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in one transfer. On a CPU they share their memory with the tensors."""
    return device_of(device).send(arrays)


class Readback:
    """Asynchronous copies of tensors to the host.

    Call `take` for each tensor, then `close`; the copies are complete once `wait` has returned.
    """

    def __init__(self) -> None:
        self._device: Device | None = None
        self._event: Event | None = None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The copy on the host, which is complete after `wait`."""
        self._device = device_of(tensor.device)
        return self._device.fetch(tensor)

    def close(self) -> None:
        if self._device is not None:
            self._event = self._device.event()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
