"""Collectives by torch.distributed: NCCL between GPUs, gloo where ranks share no memory or there is no C++ compiler."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastserve.engine.ranks.collectives import RankLostError


class ProcessGroupCollectives:
    """A group of its own, not torch's default group: nothing global is left behind."""

    def __init__(self, group: Any, device: torch.device, timeout_s: float) -> None:
        """`device`: where the group's tensors must be. `timeout_s`: longest wait for another rank."""
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._group: Any = group
        self._is_aborted = False
        self._device = device
        self.set_timeout(timeout_s)

    @classmethod
    def join(cls, file: Path, rank: int, size: int, device: torch.device, timeout_s: float) -> ProcessGroupCollectives:
        """Join the ranks of one machine that meet in `file`, which must be new and in a private folder."""
        group = make_group(dist.FileStore(str(file), size), rank, size, device, timeout_s)
        return cls(group, device if device.type == "cuda" else torch.device("cpu"), timeout_s)

    def abort(self) -> None:
        """Have all exchanges fail from now on. Any thread may call it. NCCL's end at once, gloo's at their deadline or
        with the process of the other rank."""
        self._is_aborted = True
        if self._group is not None:
            self._group.abort()

    def set_timeout(self, timeout_s: float) -> None:
        """Raises RankLostError after `abort`: exchanges in a recorded graph raise nothing, but each step ends here."""
        self._require_not_aborted()
        self._timeout_s = timeout_s
        # NCCL's exchanges run on after the call; its watchdog ends the process when one takes longer than this.
        self._group._set_default_timeout(timedelta(seconds=timeout_s))

    def all_reduce(self, partial: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        # A reduction of the group's own may add in another order on each rank.
        parts = self._gather(partial.to(torch.float32))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.to(device=partial.device, dtype=out_dtype or partial.dtype)

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._gather(values)).amax(dim=0).to(values.device)

    def all_gather(self, part: torch.Tensor, dim: int = -1) -> torch.Tensor:
        sizes = [int(size) for size in self._gather(torch.tensor([part.shape[dim]]))]
        padded = torch.zeros(*part.shape[:dim], max(sizes), *part.shape[dim:][1:], dtype=part.dtype, device=part.device)
        padded.narrow(dim, 0, part.shape[dim]).copy_(part)
        parts = [one.narrow(dim, 0, size) for one, size in zip(self._gather(padded), sizes, strict=True)]
        return torch.cat(parts, dim).to(part.device)

    def barrier(self) -> None:
        self._gather(torch.zeros(1))

    def close(self) -> None:
        self._group = None

    def _gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """The parts of all ranks, which have the same shape."""
        self._require_not_aborted()
        part = part.to(self._device).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]

        try:
            self._finish(self._group.allgather([parts], [part]))
        except RuntimeError as error:  # all errors of a group are
            reason = str(error).split("\n")[0]
            raise RankLostError(f"A step ended early: another rank of the model was lost ({reason}).") from error
        return parts

    def _finish(self, work: Any) -> None:
        """Wait for an exchange; on a GPU, have its stream wait."""
        work.wait(timedelta(seconds=self._timeout_s))

    def _require_not_aborted(self) -> None:
        if self._is_aborted:
            raise RankLostError("A step ended early: another rank of the model was lost.")


def make_group(
    store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float, ip: str = "127.0.0.1"
) -> Any:
    """A process group of torch: NCCL on CUDA, gloo elsewhere. `ip`: the address at which others reach gloo."""
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=ip)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)
