"""Devices that a machine without GPUs can have: their tensors lie in its memory, and refuse to meet those of others.

As with CUDA, an operation takes tensors of one device only (single numbers and row numbers on the CPU excepted), and
nothing but an explicit copy brings a tensor from one to another. What runs through on such devices has moved all that
it had to move, and has computed where it says it has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# A kind of device that torch knows by name and that no build of it needs a library for.
FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)
CPU = torch.device("cpu")
_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)


class DeviceTensor(torch.Tensor):  # type: ignore[misc]  # torch is not followed by mypy
    """A tensor that says that it is on another device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor, device: torch.device) -> None:
        pass

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)


class SeparateDevices(TorchDispatchMode):  # type: ignore[misc]
    """While it is entered, FIRST and SECOND can be used as devices."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[torch.device, torch.device]] = []
        """(from, to) of each copy between devices"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.copies)


@contextlib.contextmanager
def separate_devices() -> Iterator[SeparateDevices]:
    # torch.tensor(..., device=...) is then a tensor on the CPU that is copied where a mode can see it.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        # Tensors made in inference mode know nothing of views, which modes need.
        with pytest.MonkeyPatch.context() as patch, SeparateDevices() as devices:
            patch.setattr(torch, "inference_mode", torch.no_grad)
            yield devices
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def _run(
    func: Any, args: Any, kwargs: Mapping[str, Any], copies: list[tuple[torch.device, torch.device]] | None
) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    target = kwargs.get("device")
    if func in _COPIES:
        device = (target or args[0].device) if func is _COPIES[0] else args[0].device
        source = args[-1].device if func is _COPIES[1] else args[0].device
        if copies is not None and source != device:
            copies.append((source, device))
    else:
        device = _common_device(func, tensors) or target
    plain_args, plain_kwargs = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, DeviceTensor) else leaf, (args, dict(kwargs))
    )
    if target is not None:
        plain_kwargs["device"] = CPU
    if func is _aten.histc.default:  # which CPUs have for floats only
        plain_args = (plain_args[0].float(), *plain_args[1:])
    out = func(*plain_args, **plain_kwargs)
    if device is None or device.type == "cpu":
        return out
    if func._schema.is_mutable and func._schema.name.endswith("_"):
        return args[0]
    return tree_map(lambda leaf: DeviceTensor(leaf, device) if isinstance(leaf, torch.Tensor) else leaf, out)


def _common_device(func: Any, tensors: list[torch.Tensor]) -> torch.device | None:
    elsewhere = {tensor.device for tensor in tensors if isinstance(tensor, DeviceTensor)}
    here = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim() > 0]
    if func in _INDEXING and isinstance(tensors[0], DeviceTensor):
        here = [tensor for tensor in here if tensor.dtype not in (torch.int64, torch.bool)]
    if len(elsewhere) > 1 or (elsewhere and here):
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, elsewhere))} and {len(here)} on the CPU")
    return next(iter(elsewhere), None)
