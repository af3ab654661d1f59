"""Groups of ranks on several machines, all of them in this process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastserve.distributed.keys import CurveKeys
from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.ranks.network import Machines, NetworkCollectives, NetworkRelay
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives

KEYS = CurveKeys.derive("5e" * 32)


def make_relay(
    machine: int, machines: Machines, keys: CurveKeys | None = KEYS, slot_bytes: int = 1 << 20
) -> tuple[NetworkRelay, Segment]:
    if cpu_library(torch.float32) is None:
        pytest.skip("no C++ compiler")
    segment = Segment.create(sum(machines.num_ranks), slot_bytes)
    return NetworkRelay(segment, machine, machines, keys), segment


def join_machines(
    num_ranks: Sequence[int], *, keys: CurveKeys | None = KEYS, slot_bytes: int = 1 << 20, timeout_s: float = 20.0
) -> list[SharedMemoryCollectives]:
    """The collectives of all ranks. The first rank of a machine owns its segment: close it before the others."""
    machines = Machines(num_ranks, generation=1)
    made = [make_relay(machine, machines, keys, slot_bytes) for machine in range(len(num_ranks))]
    addresses = [relay.address for relay, _ in made]
    with ThreadPoolExecutor(len(made)) as pool:
        list(pool.map(lambda one: one[0].join(addresses, timeout_s), made))
    library = cpu_library(torch.float32)
    assert library is not None
    ranks: list[SharedMemoryCollectives] = []
    for machine, (relay, segment) in enumerate(made):
        first, *others = machines.ranks_of(machine)
        ranks += [SharedMemoryCollectives(library, segment, rank, timeout_s) for rank in others]
        ranks.append(NetworkCollectives(library, segment, first, timeout_s, relay))
    return sorted(ranks, key=lambda rank: rank.rank)
