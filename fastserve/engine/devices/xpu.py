"""Intel GPUs."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity

from fastserve.engine.devices.device import Device
from fastserve.engine.memory import FreeMemory


class XpuDevice(Device):
    rank = 20

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self.has_float64 = bool(torch.xpu.get_device_properties(torch_device).has_fp64)

    @classmethod
    def is_available(cls) -> bool:
        return bool(torch.xpu.is_available())

    def free_memory(self) -> FreeMemory:
        return FreeMemory(torch.xpu.mem_get_info(self.torch_device)[0], "on the GPU")

    def total_memory(self) -> int | None:
        return int(torch.xpu.mem_get_info(self.torch_device)[1])

    @property
    def profiler_activity(self) -> ProfilerActivity | None:
        return ProfilerActivity.XPU


DEVICE = XpuDevice
