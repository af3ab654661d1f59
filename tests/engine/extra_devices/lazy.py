"""The devices of separate_devices.py: a kind of device that the engine has no file for."""

from __future__ import annotations

from fastserve.engine.devices.device import Device
from fastserve.engine.memory import FreeMemory


class LazyDevice(Device):
    @classmethod
    def is_available(cls) -> bool:
        return False  # to be found

    def free_memory(self) -> FreeMemory:
        return FreeMemory(1 << 30, f"on {self.torch_device}")


DEVICE = LazyDevice
