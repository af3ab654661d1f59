"""The CPUs and the GPU that each rank of one machine computes on. No torch here: it reads both when it is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastserve.engine.settings import EngineConfig

_TOPOLOGY = Path("/sys/devices/system/cpu")


def use_own_devices(config: EngineConfig, rank: int) -> None:
    """Call it before torch is imported, in each rank with the same CPUs and GPUs allowed. `rank`: among those of this
    machine."""
    _use_own_cpus(rank, config.num_local_ranks)
    if config.device in (None, "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible is not None else [str(index) for index in range(config.num_local_ranks)]
        # A rank that finds no GPU says so.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[rank] if rank < len(gpus) else ""


def _use_own_cpus(rank: int, num_ranks: int) -> None:
    """Give this thread and those that it starts a share of the CPUs that the user allows, and torch as many threads.
    Where there are fewer CPUs than ranks, each has one thread and no CPU of its own."""
    if not hasattr(os, "sched_setaffinity"):
        num_threads = max(1, (os.cpu_count() or 1) // num_ranks)
    else:
        cpus = own_cpus(sorted(os.sched_getaffinity(0), key=_place), rank, num_ranks)
        if cpus:
            os.sched_setaffinity(0, cpus)
        num_threads = max(1, len(cpus))
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))


def own_cpus(cpus: Sequence[int], rank: int, num_ranks: int) -> Sequence[int]:
    """A rank's share of the CPUs, adjacent ones; none if there are fewer CPUs than ranks."""
    if len(cpus) < num_ranks:
        return []
    return cpus[rank * len(cpus) // num_ranks : (rank + 1) * len(cpus) // num_ranks]


def _place(cpu: int) -> tuple[int, int, int]:
    """Socket, core and number: adjacent CPUs share caches, and the two threads of a core stay with one rank."""
    return _number(cpu, "physical_package_id"), _number(cpu, "core_id"), cpu


def _number(cpu: int, name: str) -> int:
    try:
        return int((_TOPOLOGY / f"cpu{cpu}" / "topology" / name).read_text())
    except (OSError, ValueError):
        return 0
