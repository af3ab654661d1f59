"""Placement of a model's parts on devices, and transfers between them during a step.

accelerate's planner decides from the sizes of the parts. Decoder layers are never split, and tied weights stay
together. Several GPUs are filled evenly, or one after another where their caps bind; the rest goes to host memory, then
to disk. Each part is computed on its own device: hidden states, which are small, are transferred; weights and the KV
cache, which are large, never are. A part in host memory is computed by the CPU. A part on disk has memory-mapped
weights, computed by the CPU too; the system reads their pages when needed and drops them when memory is short.

Dividing the layers themselves (tensor parallelism) is another plan (partition_plan.py): more processes, each with a
shard of every weight, and no transfers of this kind.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import CustomDtype, compute_module_sizes, get_balanced_memory, get_max_layer_size
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.cache_folder import user_cache
from fastserve.engine.devices.find import device_of
from fastserve.engine.memory import free_host_memory
from fastserve.engine.spread import Spread, refuse_spread
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_WEIGHTS_SHARE = 0.85
"""Share of a device's usable memory for weights; the rest is for the KV cache and the activations of a step."""

Dtypes = Mapping[str, Any]
"""By weight name: torch dtypes, or accelerate's own for less than 8 bits (CustomDtype)."""


@dataclass(frozen=True, slots=True)
class Caps:
    """Bytes of weights that each device may hold."""

    gpus: tuple[int, ...]
    host: int | None
    """None: no offloading. Otherwise, what exceeds this goes to disk."""


@dataclass(frozen=True, slots=True)
class DevicePlace:
    device: torch.device
    """The device that computes the part."""
    on_disk: bool = False
    """Whether weights are memory-mapped from a file; the device is the CPU then."""

    def __str__(self) -> str:
        return "disk" if self.on_disk else str(self.device)


class Placement:
    """The devices of one model's parts. `put` loads weights onto them; `connect` adds the transfers between them."""

    def __init__(self, places: Mapping[str, DevicePlace], main: torch.device, folder: Path | None = None) -> None:
        """`places`: by the path of a module (with all of its submodules) or parameter. `main`: device of token ids and
        logits. `folder`: for weights on disk."""
        self._places = dict(places)
        self.main = main
        self._folder = folder
        self._handles: list[Any] = []

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that compute, `main` first."""
        return tuple(dict.fromkeys([self.main, *(place.device for place in self._places.values())]))

    def place_of(self, name: str) -> DevicePlace:
        """The place of a module, parameter or buffer, by its path."""
        path = name
        while path not in self._places:
            if not path:
                return DevicePlace(self.main)
            path = path.rpartition(".")[0]
        return self._places[path]

    def device_of(self, name: str) -> torch.device:
        """The device that the weight `name` is loaded onto."""
        return self.place_of(name).device

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a weight to its place, if it is not there. Raises StartupError when the disk is full."""
        place = self.place_of(name)
        return self._map(tensor) if place.on_disk else tensor.to(place.device)

    def connect(self, model: torch.nn.Module) -> None:
        """Add hooks that move the inputs of each part to its device, and the logits to `main`. To be called again after
        parts were replaced."""
        for handle in self._handles:
            handle.remove()
        caches: dict[torch.device, _TransferCache] = {device: _TransferCache(device) for device in self.devices}
        self._handles = [
            module.register_forward_pre_hook(_MoveInputs(caches[place.device]), with_kwargs=True)
            for path, place in self._places.items()
            for module in _called_modules(_find(model, path))
        ]

        def return_logits(_: torch.nn.Module, __: Any, output: Any) -> Any:
            for cache in caches.values():
                cache.clear()
            device_of(self.main).make_current()
            output.logits = output.logits.to(self.main)
            return output

        self._handles.append(model.register_forward_hook(return_logits))

    def _map(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._folder is None:
            raise RuntimeError("this placement has no folder for what is on disk")
        count = tensor.numel()
        # The file is unlinked at once and its space freed with its last mapping, so a killed process leaves nothing
        # behind. (Windows keeps a mapped file: there it stays until the folder is emptied.)
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as scratch:
            file = Path(scratch) / "weight"
            try:
                _reserve(file, max(1, count) * tensor.itemsize)
            except OSError as error:
                raise StartupError(
                    f"--cpu-offloading: what fits neither GPUs nor host memory goes to files in {self._folder}, and "
                    f"there is no room there ({error.strerror}): make some, or set XDG_CACHE_HOME to another folder."
                ) from error
            mapped = torch.from_file(str(file), shared=True, size=max(1, count), dtype=tensor.dtype)
        mapped = mapped[:count].view(tensor.shape)
        mapped.copy_(tensor)
        return mapped


# ---- the plan ---------------------------------------------------------------------------------------------------


def find_placement(
    model: PreTrainedModel, device: torch.device, spread: Spread, utilization: float, quantize: str | None = None
) -> Placement | None:
    """Plan the placement of `model`, whose weights may be on the meta device; None to load all of it onto `device`.
    `utilization`: share of each device's memory that may be used. `quantize`: int8 or nf4, if linear layers are
    quantized.

    Raises StartupError when the machine lacks the devices, or these cannot hold the model.
    """
    refuse_spread(device.type, spread)
    if not spread.is_multi_device:
        return None
    count = device_of(device).count()
    if spread.num_gpus > count:
        raise StartupError(
            f"--num-gpus {spread.num_gpus}: {count} {'GPU is' if count == 1 else 'GPUs are'} to be seen here (--gpus "
            f"and CUDA_VISIBLE_DEVICES choose them); start with --num-gpus {count}"
            f"{'' if spread.cpu_offloading else ', or add --cpu-offloading where the model does not fit'}."
        )
    caps = _find_caps(device, spread, utilization)
    special_dtypes = None if quantize is None else quantized_dtypes(model, quantize)
    places = plan(model, caps, special_dtypes)
    _require_fit(model, places, caps, spread, special_dtypes)
    gpus = [torch.device(device.type, index) for index in range(spread.num_gpus)]
    placement = make_placement(model, places, gpus, _offload_folder() if "disk" in places.values() else None)
    logger.info("Weights: %s", _summary(model, placement, special_dtypes))
    return placement


def plan(model: PreTrainedModel, caps: Caps, special_dtypes: Dtypes | None = None) -> dict[str, int | str]:
    """For the path of each part of the model: the index of a GPU, "cpu" or "disk"."""
    whole = _unsplittable(model)
    memory: dict[int | str, int] = dict(enumerate(caps.gpus))
    if caps.host is not None:
        memory["cpu"] = caps.host
    balanced = get_balanced_memory(model, dict(memory), whole, special_dtypes=special_dtypes)
    # The planner reserves room on the first GPU for a layer moved there from the host. We move none, so that room is
    # added back.
    _, largest = _sizes(model, special_dtypes)
    balanced[0] = min(memory[0], int(balanced[0]) + largest)
    places: dict[str, int | str] = infer_auto_device_map(
        model,
        balanced,
        whole,
        special_dtypes=special_dtypes,
        clean_result=False,
        offload_buffers=True,
        fallback_allocation=True,
    )
    return places


def quantized_dtypes(model: PreTrainedModel, quantize: str) -> dict[str, Any]:
    """Storage dtypes of linear weights, except the LM head, when they are quantized (int8 or nf4). Scales, a few
    percent more, are not counted."""
    head = model.get_output_embeddings()
    dtype = {"int8": torch.int8, "nf4": CustomDtype.INT4}[quantize]
    return {
        f"{path}.weight": dtype
        for path, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and module is not head
    }


def make_placement(
    model: PreTrainedModel,
    places: Mapping[str, int | str],
    gpus: list[torch.device],
    folder: Path | None = None,
) -> Placement:
    """The placement for a plan. `gpus`: devices by their index in the plan."""
    cpu = torch.device("cpu")
    named = {
        path: DevicePlace(gpus[place]) if isinstance(place, int) else DevicePlace(cpu, on_disk=place == "disk")
        for path, place in places.items()
    }
    main = next((place.device for place in named.values() if place.device != cpu), cpu)
    # Parts without weights (the rotary embedding) run once for all layers, on the output of the token embedding.
    start = Placement(named, main).place_of(_name_of(model, model.get_input_embeddings()))
    for path in named:
        part = _find(model, path)
        if isinstance(part, torch.nn.Module) and next(part.parameters(), None) is None:
            named[path] = DevicePlace(start.device)
    return Placement(named, main, folder)


def _find_caps(device: torch.device, spread: Spread, utilization: float) -> Caps:
    gpus = []
    for index in range(spread.num_gpus):
        gpu = device_of(torch.device(device.type, index))
        allowed = int(gpu.allowed_bytes(gpu.free_memory(), utilization) * _WEIGHTS_SHARE)
        gpus.append(allowed if spread.max_gpu_memory is None else min(allowed, spread.max_gpu_memory))
    host = int(free_host_memory().num_bytes * utilization * _WEIGHTS_SHARE) if spread.cpu_offloading else None
    return Caps(tuple(gpus), host)


def _require_fit(
    model: PreTrainedModel, places: Mapping[str, int | str], caps: Caps, spread: Spread, special_dtypes: Dtypes | None
) -> None:
    on_gpus = any(isinstance(place, int) for place in places.values())
    spills = any(isinstance(place, str) for place in places.values())
    if special_dtypes is not None and "disk" in places.values() and spread.cpu_offloading:
        raise StartupError(
            "--cpu-offloading: the GPUs and the machine's memory do not hold the model, and weights that are quantized "
            "while they are read (--load-8bit, --load-4bit) are not kept on disk: leave that flag out, or take fewer "
            "bits."
        )
    if on_gpus and (spread.cpu_offloading or not spills):
        return
    total, largest = _sizes(model, special_dtypes)
    hold = ", ".join(_gigabytes(cap) for cap in caps.gpus)
    limit = "their free memory" if spread.max_gpu_memory is None else "--max-gpu-memory and their free memory"
    if not on_gpus:
        raise StartupError(
            f"--num-gpus {spread.num_gpus}: no GPU has room for a part of the model ({_gigabytes(largest)} for the "
            f"largest, {hold} by {limit}): free GPU memory, raise --max-gpu-memory, or start with --device cpu."
        )
    raise StartupError(
        f"--num-gpus {spread.num_gpus}: the model's {_gigabytes(total)} of weights do not fit the GPUs, which may hold "
        f"{hold} by {limit}: take more GPUs, raise --max-gpu-memory, or add --cpu-offloading."
    )


def _sizes(model: PreTrainedModel, special_dtypes: Dtypes | None) -> tuple[int, int]:
    """Bytes of all weights, and of the largest part that is not split."""
    sizes = compute_module_sizes(model, special_dtypes=special_dtypes)
    largest, _ = get_max_layer_size(list(model.named_children()), sizes, _unsplittable(model))
    return int(sizes[""]), int(largest)


def _unsplittable(model: PreTrainedModel) -> list[str]:
    """Class names of modules that are not split: those that the model lists, and always its decoder layers."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    longest: Any = max(lists, key=len, default=())
    return sorted({*(getattr(model, "_no_split_modules", None) or ()), *(type(layer).__name__ for layer in longest)})


def _offload_folder() -> Path:
    try:
        folder = user_cache() / "offload"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            "--cpu-offloading: the folder for what fits neither GPUs nor host memory cannot be made "
            f"({error}); set XDG_CACHE_HOME to one that can be written."
        ) from error
    return folder


def _reserve(file: Path, num_bytes: int) -> None:
    """Allocate the file's space. Raises OSError when the disk is full: writing to a mapping without space would end the
    process by a signal."""
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, num_bytes)
        elif shutil.disk_usage(file.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            stream.truncate(num_bytes)


def _summary(model: PreTrainedModel, placement: Placement, special_dtypes: Dtypes | None) -> str:
    by_name = compute_module_sizes(model, special_dtypes=special_dtypes)
    sizes: dict[str, int] = {}
    for name, _ in model.named_parameters():
        place = str(placement.place_of(name))
        sizes[place] = sizes.get(place, 0) + int(by_name[name])
    return ", ".join(f"{_gigabytes(size)} on {place}" for place, size in sizes.items())


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


# ---- transfers during a step ------------------------------------------------------------------------------------


class _TransferCache:
    """Inputs copied to a device during a step, except hidden states. All layers of the device take the same ones
    (cosines and sines of the positions), so they are copied once a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[int, tuple[Any, Any]] = {}
        """(original, copy) by the original's id, which stays unique while the original is kept here."""

    def copy(self, value: Any) -> Any:
        found = self._copies.get(id(value))
        if found is None:
            found = self._copies[id(value)] = (value, _moved(value, self.device))
        return found[1]

    def clear(self) -> None:
        self._copies.clear()


class _MoveInputs:
    """Hook before a part of the model: moves its inputs to its device and makes that the current device."""

    def __init__(self, cache: _TransferCache) -> None:
        self._cache = cache

    def __call__(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        device = self._cache.device
        # Kernels are launched on the current device, not on that of the tensors.
        device_of(device).make_current()
        # Hidden states are not cached: each layer has new ones, though perhaps in the same tensor, changed in place.
        named = {
            name: _moved(value, device) if name == "hidden_states" else self._cache.copy(value)
            for name, value in kwargs.items()
        }
        return _moved(args, device), named


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value


# ---- names ------------------------------------------------------------------------------------------------------


def _find(model: torch.nn.Module, path: str) -> torch.nn.Module | torch.Tensor:
    parent, _, leaf = path.rpartition(".")
    found: torch.nn.Module | torch.Tensor = getattr(model.get_submodule(parent), leaf) if path else model
    return found


def _called_modules(part: torch.nn.Module | torch.Tensor) -> Iterator[torch.nn.Module]:
    """The modules of a part that model code calls: not a ModuleList, but its layers."""
    if not isinstance(part, torch.nn.Module):
        return
    if type(part).forward is not torch.nn.Module.forward:
        yield part
        return
    for child in part.children():
        yield from _called_modules(child)


def _owners(model: torch.nn.Module) -> list[tuple[str, list[tuple[torch.nn.Module, str]]]]:
    """The first name of each parameter and buffer, with all modules that hold it and their names for it."""
    found: dict[int, tuple[str, list[tuple[torch.nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{path}.{leaf}" if path else leaf
                found.setdefault(id(tensor), (name, []))[1].append((module, leaf))
    return list(found.values())


def _name_of(model: torch.nn.Module, module: torch.nn.Module | None) -> str:
    return next((path for path, other in model.named_modules() if other is module), "")
