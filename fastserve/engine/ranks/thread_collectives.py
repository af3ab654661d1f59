"""Ranks that are threads of one process, for small trials of a divided model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from fastserve.engine.ranks.collectives import Collectives, RankLostError

T = TypeVar("T")


class _Meeting:
    """The parts of all ranks in the current exchange."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadCollectives:
    """The `Collectives` of one thread."""

    def __init__(self, rank: int, size: int, meeting: _Meeting, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._meeting = meeting
        self._timeout_s = timeout_s

    def all_reduce(self, partial: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        total = torch.zeros_like(partial, dtype=torch.float32)
        for part in self._exchange(partial):
            total += part
        return total.to(out_dtype or partial.dtype)

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(values)).amax(0)

    def all_gather(self, part: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(part), dim=dim)

    def barrier(self) -> None:
        try:
            self._meeting.barrier.wait(self._timeout_s)
        except threading.BrokenBarrierError as error:
            raise RankLostError("another rank ended or does not answer") from error

    def set_timeout(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def close(self) -> None:
        self._meeting.barrier.abort()

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        # A copy, since the owner may go on to change its part while others read it.
        self._meeting.parts[self.rank] = part.clone()
        self.barrier()
        parts = list(self._meeting.parts)
        self.barrier()
        return parts


def run_ranks(size: int, run: Callable[[Collectives], T], timeout_s: float = 60.0) -> list[T]:
    """Call `run` on `size` threads, one for each rank; its results in rank order. When a rank fails, the others do too,
    and its exception is raised."""
    meeting = _Meeting(size)

    def start(rank: int) -> T:
        try:
            return run(ThreadCollectives(rank, size, meeting, timeout_s))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size, thread_name_prefix="rank") as pool:
        futures = [pool.submit(start, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, RankLostError)), errors[0])
    return [future.result() for future in futures]
