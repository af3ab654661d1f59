"""The collectives of a rank, by the kind of its device."""

from __future__ import annotations

from pathlib import Path

from fastserve.distributed.gang import Gang
from fastserve.distributed.keys import CurveKeys
from fastserve.engine.devices.find import find_device
from fastserve.engine.ranks.gang_messages import Formed
from fastserve.engine.ranks.mesh import MeshCollectives
from fastserve.engine.ranks.process_group import ProcessGroupCollectives
from fastserve.engine.ranks.processes import MAX_START_SILENCE_S
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives

RankCollectives = SharedMemoryCollectives | ProcessGroupCollectives


def join_ranks(
    device_name: str | None, segment: Segment, meeting_file: Path, rank: int, timeout_s: float
) -> RankCollectives:
    """Join the other ranks of this machine: shared memory on CPUs, NCCL on CUDA, gloo elsewhere.

    Raises StartupError when there is no such device."""
    device = find_device(device_name).torch_device
    if device.type == "cpu":
        found = SharedMemoryCollectives.load(segment, rank, timeout_s)
        if found is not None:
            return found
    return ProcessGroupCollectives.join(meeting_file, rank, segment.num_ranks, device, timeout_s)


def join_machines(gang: Gang, rank: int, formed: Formed, keys: CurveKeys | None) -> MeshCollectives:
    """Join the ranks of several machines. Raises StartupError when this rank's port cannot be bound."""
    addresses = [(ip, gang.exchange_port(other)) for other, ip in enumerate(formed.ips)]
    return MeshCollectives(addresses, rank, formed.generation, keys, MAX_START_SILENCE_S)
