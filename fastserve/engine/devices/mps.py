"""Apple GPUs, which share the machine's memory."""

from __future__ import annotations

import torch

from fastserve.engine.devices.device import Device
from fastserve.engine.memory import FreeMemory, free_host_memory


class MpsDevice(Device):
    rank = 10
    has_float64 = False

    @classmethod
    def is_available(cls) -> bool:
        return bool(torch.backends.mps.is_available())

    def free_memory(self) -> FreeMemory:
        return free_host_memory()


DEVICE = MpsDevice
