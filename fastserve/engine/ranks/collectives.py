"""The contract of collectives: the exchange of tensors between the ranks of one model."""

from __future__ import annotations

from typing import Protocol

import torch

from fastserve.errors import EngineDeadError


class RankLostError(EngineDeadError):
    """Another rank is gone, was declared lost, or does not answer in time."""


class Collectives(Protocol):
    """Exchange of tensors between the ranks of one model. Every rank makes the same calls in the same order.

    All calls wait for the other ranks, and raise RankLostError when one of them is lost.
    """

    rank: int
    size: int
    """Number of ranks."""

    def all_reduce(self, partial: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Sum over ranks in rank order, in float32, rounded once to `out_dtype` (default: that of `partial`). All ranks
        get the same bits."""
        ...

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over ranks of each value. For loading and sizes, not for steps."""
        ...

    def all_gather(self, part: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate every rank's part along `dim`, in rank order; parts may differ in size along it."""
        ...

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        ...

    def set_timeout(self, timeout_s: float) -> None:
        """Set the longest wait for another rank, of all calls from now on."""
        ...

    def close(self) -> None:
        """Leave the group. May be called twice."""
        ...


class SingleRank:
    """The collectives of a model that one rank computes: every call returns its argument."""

    rank = 0
    size = 1

    def all_reduce(self, partial: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return partial if out_dtype is None else partial.to(out_dtype)

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def all_gather(self, part: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return part

    def barrier(self) -> None:
        pass

    def set_timeout(self, timeout_s: float) -> None:
        pass

    def close(self) -> None:
        pass


SINGLE_RANK: Collectives = SingleRank()
