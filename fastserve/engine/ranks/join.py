"""The collectives of a rank, by the kind of its device."""

from __future__ import annotations

from pathlib import Path

from fastserve.distributed.gang import Gang, host_and_port
from fastserve.distributed.keys import CurveKeys
from fastserve.engine.devices.find import find_device
from fastserve.engine.ranks.gang_messages import Formed
from fastserve.engine.ranks.machine_group import MachineGroupCollectives
from fastserve.engine.ranks.network import Machines, NetworkCollectives, NetworkRelay, kernels_for_machines
from fastserve.engine.ranks.pass_segment import IsLost, pass_segment, receive_segment
from fastserve.engine.ranks.process_group import ProcessGroupCollectives
from fastserve.engine.ranks.processes import MAX_START_SILENCE_S
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
from fastserve.engine.settings import EngineConfig
from fastserve.errors import FastserveError, StartupError

RankCollectives = SharedMemoryCollectives | ProcessGroupCollectives


def join_group(
    config: EngineConfig,
    gang: Gang,
    rank: int,
    formed: Formed,
    keys: CurveKeys | None,
    is_lost: IsLost,
) -> RankCollectives:
    """Join the other ranks of a group that has formed. Should be closed. `is_lost`: whether it was lost since.

    Raises StartupError when there is no such device, and where the ranks of several machines cannot exchange;
    RankLostError when another rank does not come."""
    if gang.is_one_machine:
        return _join_one_machine(config.device, gang, rank, formed, is_lost)
    return join_machines(gang, rank, formed, keys, is_lost, nccl=uses_nccl(config))


def _join_one_machine(
    device_name: str | None, gang: Gang, rank: int, formed: Formed, is_lost: IsLost
) -> RankCollectives:
    """Shared memory on CPUs, NCCL on CUDA, gloo elsewhere."""
    device = find_device(device_name).torch_device
    timeout_s, folder = MAX_START_SILENCE_S, Path(gang.folder)
    if rank > 0:
        segment = receive_segment(folder, formed.generation, gang.size, timeout_s, is_lost)
    else:
        segment = Segment.create(gang.size)
        try:
            pass_segment(segment, folder, formed.generation, gang.size - 1, timeout_s, is_lost)
        except FastserveError:
            segment.close()
            raise
    if device.type == "cpu":
        found = SharedMemoryCollectives.load(segment, rank, timeout_s)
        if found is not None:
            return found
    segment.close()
    meeting_file = folder / f"group-{formed.generation:x}"
    return ProcessGroupCollectives.join(meeting_file, rank, gang.size, device, timeout_s)


def uses_nccl(config: EngineConfig) -> bool:
    """Whether ranks on several machines exchange by NCCL. Raises StartupError when they should and have no GPU."""
    on_gpus = find_device(config.device).torch_device.type == "cuda"
    if config.machine_collectives == "nccl" and not on_gpus:
        raise StartupError("--machine-collectives nccl needs --device cuda: on other devices leave it out.")
    return on_gpus and config.machine_collectives != "host"


def join_machines(
    gang: Gang,
    rank: int,
    formed: Formed,
    keys: CurveKeys | None,
    is_lost: IsLost = lambda: False,
    *,
    nccl: bool = False,
) -> SharedMemoryCollectives | MachineGroupCollectives:
    """Join the ranks of several machines, through the hosts' memory unless by `nccl`. Should be closed. `is_lost`:
    whether the group was lost since it formed.

    Raises StartupError when the kernels cannot be built or the relay's port cannot be bound, and RankLostError when
    another rank does not come."""
    timeout_s, folder = MAX_START_SILENCE_S, Path(gang.folder)
    if nccl:
        device = find_device("cuda").torch_device
        return MachineGroupCollectives.join_gang(gang, rank, formed, keys, device, timeout_s, is_lost)
    library = kernels_for_machines()
    first, *others = gang.local_ranks
    if rank != first:
        segment = receive_segment(folder, formed.generation, gang.size, timeout_s, is_lost)
        return SharedMemoryCollectives(library, segment, rank, timeout_s)
    machines = Machines([gang.local_size] * len(gang.machines), formed.generation)
    addresses = [
        host_and_port(formed.ips[part * gang.local_size], gang.relay_port(part)) for part in range(len(gang.machines))
    ]
    segment = Segment.create(gang.size)
    try:
        relay = NetworkRelay(segment, gang.part, machines, keys, addresses[gang.part])
    except StartupError:
        segment.close()
        raise
    collectives = NetworkCollectives(library, segment, rank, timeout_s, relay)
    try:
        pass_segment(segment, folder, formed.generation, len(others), timeout_s, is_lost)
        relay.join(addresses, timeout_s, is_lost)
    except FastserveError:
        collectives.close()
        raise
    return collectives
