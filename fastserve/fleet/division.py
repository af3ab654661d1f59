"""Workers whose ranks are on several machines of a Ray cluster: how many machines, and what each is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from fastserve.distributed.gang import Gang
from fastserve.distributed.machines import Machine
from fastserve.fleet.service_process import Command

ENV_GANG = "FASTSERVE_GANG"
"""Environment variable of a part's process, with all machines (`Gang` as JSON)."""
FORM_TIMEOUT_S = 1800.0
"""Longest wait for the ranks of other machines, which may have to be started first."""


@dataclass(frozen=True)
class NodeRoom:
    """Resources of one machine of the cluster, used or not."""

    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Part:
    """The ranks that one machine has of a worker."""

    worker: str
    """Name of the worker that all its parts share."""
    number: int
    num_parts: int
    ranks_per_machine: int


def num_machines(num_ranks: int, cpus_per_rank: float, gpus_per_rank: int, nodes: Sequence[NodeRoom]) -> int:
    """The fewest machines that hold all ranks, each as many of them; 1 if no number does: it may join later."""
    for count in range(1, num_ranks + 1):
        if num_ranks % count == 0:
            share = num_ranks // count
            held = sum(_fit(node, share * cpus_per_rank, share * gpus_per_rank) for node in nodes)
            if held >= count:
                return count
    return 1


def _fit(node: NodeRoom, num_cpus: float, num_gpus: int) -> int:
    """How often both numbers are there."""
    fits = [int(have / need) for have, need in ((node.num_cpus, num_cpus), (node.num_gpus, num_gpus)) if need > 0]
    return min(fits, default=1)


def with_machines(command: Command, part: Part, addresses: Sequence[tuple[str, int]]) -> Command:
    """The command of one part. `addresses`: IP address and first port of each part."""
    machines = tuple(
        Machine(number, f"{part.worker}_part{number}", ip, port) for number, (ip, port) in enumerate(addresses)
    )
    gang = Gang(machines, part.ranks_per_machine, part.number, FORM_TIMEOUT_S)
    return dataclasses.replace(command, environ=(*command.environ, (ENV_GANG, msgspec.json.encode(gang).decode())))
