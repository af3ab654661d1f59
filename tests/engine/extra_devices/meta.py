"""Tensors without values, which tests use to find whoever asks for some."""

from __future__ import annotations

from fastserve.engine.devices.device import Device
from fastserve.engine.memory import FreeMemory


class MetaDevice(Device):
    @classmethod
    def is_available(cls) -> bool:
        return False  # to be found

    def free_memory(self) -> FreeMemory:
        return FreeMemory(1 << 30, f"on {self.torch_device}")


DEVICE = MetaDevice
