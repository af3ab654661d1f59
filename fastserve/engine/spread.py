"""The flags that spread a model over devices, and their checks. No torch here: the worker imports it too."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastserve.errors import StartupError

_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)
_GPU_ID = re.compile(r"\d+|(?:GPU|MIG)-[0-9A-Za-z/-]+")
"""A number, or the driver's UUID of a GPU or MIG instance."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Devices over which a model is spread."""

    num_gpus: int = 1
    max_gpu_memory: int | None = None
    """Bytes of weights on each GPU; None: the free memory, less a share for the KV cache."""
    cpu_offloading: bool = False

    @property
    def is_multi_device(self) -> bool:
        """Whether the model may be on more than one device. On a single GPU `max_gpu_memory` has no effect, as in
        FastChat."""
        return self.num_gpus > 1 or self.cpu_offloading


def read_gpu_memory(text: str) -> int:
    """Parse `--max-gpu-memory` (20GiB, 20GB, 1.5GiB, 800MiB) to bytes. Raises StartupError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        example = f"{text.strip()}GiB" if text.strip().isdigit() and int(text) else "20GiB or 20GB"
        raise StartupError(f"--max-gpu-memory {text} is not a size with its unit: write, for one, {example}.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].upper()])


def refuse_gpu_ids(gpus: str) -> None:
    """Check `--gpus`: CUDA ignores a list from its first invalid id on, and silently shows fewer GPUs. Raises
    StartupError."""
    ids = [part.strip() for part in gpus.split(",")]
    wrong = next((part for part in ids if not _GPU_ID.fullmatch(part)), None)
    if wrong is not None:
        raise StartupError(
            f"--gpus {gpus}: {wrong!r} is no GPU id; write numbers with commas between them, such as 0,2."
        )
    if len(set(ids)) < len(ids):
        raise StartupError(f"--gpus {gpus} names a GPU twice: name each once.")


def refuse_spread(device: str, spread: Spread) -> None:
    """Raises StartupError for flags that a kind of device (cpu, cuda, mps, xpu) does not support."""
    if spread.num_gpus < 1:
        raise StartupError(f"--num-gpus {spread.num_gpus} is too small: the least is 1.")
    if device == "cuda" or not spread.is_multi_device:
        return
    if spread.num_gpus > 1:
        raise StartupError(
            f"--num-gpus {spread.num_gpus} works with --device cuda only, and the device is {device}: leave it out"
            f"{'' if device in ('cpu', 'mps') else ', or start one worker for each GPU under one model name'}."
        )
    if device == "xpu":
        raise StartupError("--cpu-offloading works with --device cuda only, and the device is xpu: leave it out.")
    raise StartupError(
        f"--cpu-offloading has nothing to move: with the device {device} the model is in the machine's own memory; "
        "leave it out."
    )
