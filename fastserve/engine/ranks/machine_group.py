"""Collectives of several machines by torch.distributed: NCCL between their GPUs (gloo on CPUs, for tests).

Ranks meet in a store that asks for the cluster key (curve_store.py). Tensors then go as NCCL sends them: it neither
encrypts nor asks for keys, so the network between the machines must be private. Relays (network.py) do both.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist

from fastserve.distributed.gang import Gang, host_and_port
from fastserve.distributed.keys import CurveKeys
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.curve_store import CurveStore, StoreServer
from fastserve.engine.ranks.gang_messages import Formed
from fastserve.engine.ranks.process_group import ProcessGroupCollectives, make_group
from fastserve.errors import FastserveError

logger = logging.getLogger(__name__)

_INTERFACE = "NCCL_SOCKET_IFNAME"
_SPIN_S, _PAUSE_S = 0.001, 0.0002


class MachineGroupCollectives(ProcessGroupCollectives):
    """Owns the store that the group has met in, which its threads go on using, and on rank 0 the store's server."""

    def __init__(
        self, group: Any, device: torch.device, timeout_s: float, store: CurveStore, server: StoreServer | None
    ) -> None:
        super().__init__(group, device, timeout_s)
        self._store = store
        self._server = server

    @classmethod
    def join_gang(
        cls,
        gang: Gang,
        rank: int,
        formed: Formed,
        keys: CurveKeys | None,
        device: torch.device,
        timeout_s: float,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> MachineGroupCollectives:
        """Join the ranks of all machines, which meet where part 0 would relay tensors otherwise. `is_lost`: whether
        another one was lost since they formed a group.

        Raises StartupError when that port cannot be bound, and RankLostError when another rank does not come."""
        address = host_and_port(formed.ips[0], gang.relay_port(0))
        server = StoreServer(keys, address) if rank == 0 else None
        ip = formed.ips[rank]
        if device.type == "cuda":
            _use_interface(ip)
            if rank == 0:
                logger.warning(
                    "NCCL sends tensors between machines as they are, unencrypted: their network must be private. "
                    "--machine-collectives host encrypts them."
                )
        store = None
        try:
            store = CurveStore(keys, address, timeout_s, is_lost)
            return cls.meet(store, server, f"{formed.generation:x}", rank, gang.size, device, timeout_s, ip)
        except FastserveError:
            if store is not None:
                store.close()
            if server is not None:
                server.close()
            raise

    @classmethod
    def meet(
        cls,
        store: CurveStore,
        server: StoreServer | None,
        name: str,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
        ip: str,
    ) -> MachineGroupCollectives:
        """Join the ranks that meet in `store` under `name`, which must be new. Raises RankLostError."""
        try:
            group = make_group(dist.PrefixStore(name, store), rank, size, device, timeout_s, ip)
        except RuntimeError as error:
            raise RankLostError(f"The ranks of the model did not come together: {error}") from error
        found = cls(group, device if device.type == "cuda" else torch.device("cpu"), timeout_s, store, server)
        found.barrier()  # NCCL connects at the first exchange
        return found

    def abort(self) -> None:
        self._store.abort()
        super().abort()

    def close(self) -> None:
        super().close()
        self._store.close()
        if self._server is not None:
            self._server.close()

    def _finish(self, work: Any) -> None:
        if self._device.type == "cuda":
            super()._finish(work)
            return
        # gloo's own wait would not end with `abort`.
        begin = time.monotonic()
        while not work.is_completed():
            waited_s = time.monotonic() - begin
            if waited_s > self._timeout_s:
                raise RankLostError(
                    f"A step ended early: another rank of the model did not answer within {self._timeout_s:g} s."
                )
            self._require_not_aborted()
            if waited_s > _SPIN_S:
                time.sleep(_PAUSE_S)
        work.wait()


def _use_interface(ip: str) -> None:
    """Have NCCL connect by the interface with this address, unless the user names one."""
    if _INTERFACE in os.environ:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == ip for address in addresses):
            os.environ[_INTERFACE] = f"={name}"
            return
