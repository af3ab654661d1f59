"""A model worker that torchrun starts: `torchrun --nproc-per-node 2 -m fastserve.model_worker ...`.

torchrun starts one process for each rank. The first of them serves, and starts the ranks itself as it does with
--tp-size; the others only wait for its end, so that torchrun sees the whole group run and end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from fastserve.distributed.problems import Problems
from fastserve.distributed.variables import Variables
from fastserve.errors import StartupError

MAX_RANKS = 64
_MAX_PORT = 65535
_DEFAULT_NUM_THREADS = "1"
"""OMP_NUM_THREADS that torchrun sets where the user has set none."""


@dataclass(frozen=True)
class TorchrunProcess:
    """This process's place in a group of torchrun, all on one machine."""

    rank: int
    size: int


def read_torchrun(environ: Mapping[str, str], tp_size: int) -> TorchrunProcess | None:
    """None: torchrun did not start this process. `tp_size`: of the command line; 1 if it is not given.

    Raises EnvironmentFault, with everything that is wrong."""
    problems = Problems()
    variables = Variables(environ, problems)
    if variables.text("LOCAL_RANK") is None:
        return None  # RANK and WORLD_SIZE alone are also set by others, for other purposes
    rank = variables.integer("LOCAL_RANK", 0, 0, MAX_RANKS - 1)
    size = variables.integer("WORLD_SIZE", 1, 1, MAX_RANKS)
    world_rank = variables.integer("RANK", rank, 0, MAX_RANKS - 1)
    local_size = variables.integer("LOCAL_WORLD_SIZE", size, 1, MAX_RANKS)
    variables.integer("MASTER_PORT", 1, 1, _MAX_PORT)
    for name in ("RANK", "WORLD_SIZE"):
        if variables.text(name) is None:
            problems.add(
                f"LOCAL_RANK is set and {name} is not: torchrun sets both. Unset LOCAL_RANK to start without it."
            )
    if variables.are_valid("WORLD_SIZE", "LOCAL_WORLD_SIZE") and local_size < size:
        problems.add(
            f"LOCAL_WORLD_SIZE={local_size} of WORLD_SIZE={size}: ranks on several machines are not supported. "
            "Start torchrun on one machine, with --nnodes 1."
        )
    elif variables.are_valid("WORLD_SIZE", "LOCAL_WORLD_SIZE") and local_size > size:
        problems.add(f"LOCAL_WORLD_SIZE={local_size} is more than WORLD_SIZE={size}: torchrun sets both to one number.")
    elif variables.are_valid("LOCAL_RANK", "RANK") and world_rank != rank:
        problems.add(f"RANK={world_rank} and LOCAL_RANK={rank} differ: on one machine they are the same number.")
    if variables.are_valid("LOCAL_RANK", "WORLD_SIZE") and rank >= size:
        problems.add(f"LOCAL_RANK={rank} must be less than WORLD_SIZE={size}: ranks are numbered from 0.")
    if variables.are_valid("WORLD_SIZE") and tp_size not in (1, size):
        problems.add(
            f"--tp-size {tp_size} and WORLD_SIZE={size} differ: leave --tp-size out, or give torchrun "
            f"--nproc-per-node {tp_size}."
        )
    problems.raise_if_any()
    return TorchrunProcess(rank, size)


def drop_default_threads(environ: dict[str, str] | os._Environ[str]) -> None:
    """Unset torchrun's own default of one thread, so that each rank has as many threads as CPUs."""
    if environ.get("OMP_NUM_THREADS") == _DEFAULT_NUM_THREADS:
        del environ["OMP_NUM_THREADS"]


def wait_for_first_rank() -> None:
    """Wait for the end of the process with LOCAL_RANK=0, a child of the same torchrun.

    Raises StartupError when there is none: it has ended already, or is started in another way."""
    own = psutil.Process()
    for process in psutil.Process(os.getppid()).children():
        try:
            if process != own and process.environ().get("LOCAL_RANK") == "0":
                process.wait()
                return
        except psutil.Error:
            continue  # it has ended meanwhile, or is another user's
    raise StartupError(
        "No process with LOCAL_RANK=0 runs beside this one: it has ended, and says why in its log, or torchrun started "
        "the worker through another program. Start it as torchrun --nproc-per-node N -m fastserve.model_worker."
    )
