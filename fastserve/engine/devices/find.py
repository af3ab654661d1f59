"""Finds devices: the one to use, and the object for each of torch's."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Sequence

import torch

from fastserve.engine import devices
from fastserve.engine.attention.backend import AttentionBackend
from fastserve.engine.attention.metadata import LayerShape
from fastserve.engine.devices.device import Device
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps, ElementwiseOpsByDevice
from fastserve.errors import StartupError

_OTHER_FILES = {"device", "find"}


def find_device(name: str | None) -> Device:
    """The named device, or the best one of this machine. Raises StartupError when the named one is missing."""
    available = sorted(
        (kind for kind in _kinds() if _class_of(kind).is_available()), key=lambda kind: _class_of(kind).rank
    )
    if name is not None and name not in available:
        raise StartupError(
            f"--device {name}: this machine or this build of torch has no such device; try --device cpu."
        )
    # With its index, as tensors have it: cuda is not equal to cuda:0.
    return device_of(torch.empty(0, device=name or available[0]).device)


@functools.cache
def device_of(torch_device: torch.device) -> Device:
    """The object for a device of torch. Raises ModuleNotFoundError for a type that has no file."""
    return _class_of(torch_device.type)(torch_device)


def attention_backend(
    torch_device: torch.device, shapes: Sequence[LayerShape], dtype: torch.dtype, block_size: int
) -> AttentionBackend:
    """The attention backend for these layers on a device."""
    return device_of(torch_device).attention_backend(shapes, dtype, block_size)


def elementwise_ops(torch_devices: Iterable[torch.device], dtype: torch.dtype) -> ElementwiseOps | None:
    """Fused operations for tensors on all of these devices; None where one of them has none."""
    by_type: dict[str, ElementwiseOps] = {}
    for torch_device in torch_devices:
        ops = by_type.get(torch_device.type) or device_of(torch_device).elementwise_ops(dtype)
        if ops is None:
            return None
        by_type[torch_device.type] = ops
    return next(iter(by_type.values())) if len(by_type) == 1 else ElementwiseOpsByDevice(by_type)


def _kinds() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(devices.__path__) if module.name not in _OTHER_FILES]


def _class_of(kind: str) -> type[Device]:
    found: type[Device] = importlib.import_module(f"{devices.__name__}.{kind}").DEVICE
    return found
