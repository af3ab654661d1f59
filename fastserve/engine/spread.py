"""What the flags about devices ask for, and which of it no machine can do. Knows no torch: the worker reads it too."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastserve.errors import StartupError

_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)
_GPU_ID = re.compile(r"\d+|(?:GPU|MIG)-[0-9A-Za-z/-]+")
"""A number, or the name that the driver gives a GPU or a part of one."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Over what a model is spread."""

    num_gpus: int = 1
    max_gpu_memory: int | None = None
    """Bytes of weights on each GPU; None: what is free, less a share for the KV cache."""
    cpu_offloading: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether the model may live on more than one device. With a single one a cap has no effect, as in FastChat."""
        return self.num_gpus > 1 or self.cpu_offloading


def read_gpu_memory(text: str) -> int:
    """Bytes of `--max-gpu-memory`: 20GiB, 20GB, 1.5GiB, 800MiB. Raises StartupError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        example = f"{text.strip()}GiB" if text.strip().isdigit() and int(text) else "20GiB or 20GB"
        raise StartupError(f"--max-gpu-memory {text} is not a size with its unit: write, for one, {example}.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].upper()])


def refuse_gpu_ids(gpus: str) -> None:
    """CUDA takes a list that it cannot read for one that ends there, and shows fewer GPUs without a word. Raises
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
    """Raises StartupError for what the flags ask of a kind of device (cpu, cuda, mps, xpu) that cannot do it."""
    if spread.num_gpus < 1:
        raise StartupError(f"--num-gpus {spread.num_gpus} is too small: the least is 1.")
    if device == "cuda" or not spread.is_wanted:
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
