"""A trainer's process group, as one more member sees it.

The group is no part of this process's own torch.distributed: it has a store and connections of its own, and several may
exist. Keys in the store are those of trainers that make their group with `torch.distributed.init_process_group`'s
internals under the group's name (SGLang's `init_custom_process_group` and those that were copied from it): the store is
prefixed by the name, and torch prefixes it again by the name and the device type.
"""

from __future__ import annotations

import contextlib
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastserve.engine.weight_messages import GroupSettings
from fastserve.errors import EngineTimeoutError, InvalidRequestError, WeightTransferError
from fastserve.observability.text import printable

_DEVICE_TYPES = {"gloo": "cpu", "nccl": "cuda"}


class WeightGroup:
    """Created by `connect`."""

    def __init__(self, settings: GroupSettings, rank: int, store: Any, group: Any, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        """Where tensors are received."""
        self.rank = rank
        self._store = store
        self._group = group

    @classmethod
    def connect(cls, settings: GroupSettings, local_rank: int, device: torch.device) -> WeightGroup:
        """Join the group; waits for all of its members. Raises EngineTimeoutError when they do not come in time, and
        InvalidRequestError when the group cannot be joined from here. Any thread may call it."""
        rank = settings.rank + local_rank
        timeout = timedelta(seconds=settings.timeout_s)
        where = f"{printable(settings.master_address)}:{settings.master_port}"
        if settings.backend == "nccl" and (device.type != "cuda" or not dist.is_nccl_available()):
            raise InvalidRequestError(
                f"backend nccl needs an NVIDIA GPU, and this model is on {device}: give gloo.", param="backend"
            )
        try:
            socket.getaddrinfo(settings.master_address, settings.master_port)
        except (OSError, UnicodeError) as error:
            raise InvalidRequestError(
                f"{where}: {error}. Give the trainer's address.", param="master_address"
            ) from error
        try:
            store = dist.TCPStore(
                settings.master_address,
                settings.master_port,
                settings.world_size,
                is_master=rank == 0,
                timeout=timeout,
                multi_tenant=True,
            )
            prefixed = store
            for prefix in (settings.group_name, f"{settings.group_name}/", f"{_DEVICE_TYPES[settings.backend]}/"):
                prefixed = dist.PrefixStore(prefix, prefixed)
            group = _make_group(settings, prefixed, rank, timeout)
        except RuntimeError as error:  # torch's errors of stores and groups, time-outs among them
            raise EngineTimeoutError(
                f"The group {printable(settings.group_name)} of {settings.world_size} members did not form at {where} "
                f"(time-out: {settings.timeout_s:g} s): start the trainer with the same address, port, world_size and "
                f"group_name. torch says: {_first_line(error)}"
            ) from error
        return cls(settings, rank, store, group, device if settings.backend == "nccl" else torch.device("cpu"))

    def warm_up(self) -> float:
        """Sum one number over all members; return the seconds that it took."""
        begin = time.perf_counter()
        number = torch.ones(1, device=self.device)
        self._wait(self._group.allreduce([number]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin

    def broadcast(self, tensor: torch.Tensor, root: int) -> Broadcast:
        """Begin to receive `tensor` from the member `root`. Members begin their broadcasts in the same order."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        group = self._group
        try:
            if group is None:
                raise RuntimeError("this member has left the group")
            return Broadcast(self, group.broadcast([tensor], options))
        except RuntimeError as error:
            raise self._lost(error) from error

    def close(self) -> None:
        """Leave the group: what is being received fails."""
        group, self._group, self._store = self._group, None, None
        if group is not None and hasattr(group, "abort"):
            with contextlib.suppress(RuntimeError):  # it is broken already
                group.abort()

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> WeightTransferError:
        name = printable(self.settings.group_name)
        return WeightTransferError(
            f"The transfer over the group {name} failed: another member died, or sent nothing for "
            f"{self.settings.timeout_s:g} s, or other sizes. The group is gone; join it again. torch says: "
            f"{_first_line(error)}"
        )


class Broadcast:
    """A broadcast in flight."""

    def __init__(self, group: WeightGroup, work: Any) -> None:
        self._group = group
        self._work = work

    def is_done(self) -> bool:
        """Whether `wait` returns at once, or raises."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """Wait until the tensor is there. Raises WeightTransferError."""
        self._group._wait(self._work)
        if self._group.device.type == "cuda":
            torch.cuda.current_stream(self._group.device).synchronize()


def _first_line(error: RuntimeError) -> str:
    return printable((str(error) or type(error).__name__).splitlines()[0])


def _make_group(settings: GroupSettings, store: Any, rank: int, timeout: timedelta) -> Any:
    if settings.backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, settings.world_size, timeout=timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.group_name = settings.group_name
    return dist.ProcessGroupNCCL(store, rank, settings.world_size, options)
