"""Low-rank changes: W + scale * B A (Hu et al., 2021), by magnitude and direction (DoRA; Liu et al., 2024), with a
diagonal between B and A (KaSA), with block-diagonal matrices (BD-LoRA), or for each expert of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastserve.engine.loading.checkpoint import StoredTensor
from fastserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class LowRank:
    a: StoredTensor
    """(rank, in)"""
    b: StoredTensor
    """(out, rank)"""
    scale: float
    is_transposed: bool = False
    """The weight is (in, out): embeddings, Conv1D."""
    magnitude: StoredTensor | None = None
    """DoRA's norms (out,)"""
    diagonal: StoredTensor | None = None
    """KaSA's diagonal (rank,)"""
    blocks_of_a: int = 1
    """Number of diagonal blocks, stored below each other."""
    blocks_of_b: int = 1

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.t() if self.is_transposed else weight
        change = self._change()
        _require_shape(self.a, self.b, tuple(change.shape), name, tuple(weight.shape))
        changed = weight + change
        if self.magnitude is not None:
            norms = torch.linalg.norm(changed, dim=1)
            magnitude = _vector(self.magnitude, len(norms), name)
            changed = changed * (magnitude / norms).unsqueeze(1)
        return changed.t() if self.is_transposed else changed

    def _change(self) -> torch.Tensor:
        """(out, in)"""
        a, b = _blocks(self.a, self.blocks_of_a), _blocks(self.b, self.blocks_of_b)
        if self.diagonal is not None:
            b = b * _vector(self.diagonal, b.shape[1], self.b.name)
        if a.shape[0] != b.shape[1]:
            raise StartupError(
                f"{self.a.file}: {self.a.name} and {self.b.name} have the shapes {self.a.shape} and {self.b.shape}, "
                "which are of different ranks. Save the adapter again."
            )
        return (b @ a) * self.scale


@dataclass(frozen=True, slots=True)
class LowRankExperts:
    """A change of each expert's matrix in a joint weight (experts, out, in)."""

    a: StoredTensor
    """(experts * rank, in)"""
    b: StoredTensor
    """(out, rank * experts): the expert is the last index"""
    scale: float
    is_transposed: bool
    """The weight is (experts, in, out)."""

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        experts, out, width = weight.shape if not self.is_transposed else weight.transpose(1, 2).shape
        a, b = self.a.read().float(), self.b.read().float()
        shape = (b.shape[0], a.shape[1])
        _require_shape(self.a, self.b, (experts, *shape), name, (experts, out, width))
        if a.shape[0] % experts or a.shape[0] != b.shape[1]:
            raise StartupError(
                f"{self.a.file}: {self.a.name} and {self.b.name} have the shapes {self.a.shape} and {self.b.shape}, "
                f"which are no matrices of {experts} experts, as {name} of the base model has."
            )
        a, b = a.view(experts, -1, width), b.view(out, -1, experts).permute(2, 0, 1)
        change = torch.bmm(b, a) * self.scale
        return weight + (change.transpose(1, 2) if self.is_transposed else change)


@dataclass(frozen=True, slots=True)
class LowRankBias:
    """The change that the bias of B makes: b + scale * bias."""

    bias: StoredTensor
    scale: float

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + _vector(self.bias, weight.numel(), name) * self.scale


def _blocks(stored: StoredTensor, count: int) -> torch.Tensor:
    tensor = stored.read().float()
    if count == 1:
        return tensor
    if tensor.shape[0] % count:
        raise StartupError(f"{stored.file}: {stored.name} of shape {stored.shape} is not made of {count} equal blocks.")
    return torch.block_diag(*tensor.chunk(count))


def _vector(stored: StoredTensor, size: int, name: str) -> torch.Tensor:
    tensor = stored.read().float().flatten()
    if len(tensor) != size:
        raise StartupError(
            f"{stored.file}: {stored.name} has {len(tensor)} values, and {name} needs {size}: the adapter is of "
            "another model."
        )
    return tensor


def _require_shape(
    a: StoredTensor, b: StoredTensor, found: tuple[int, ...], name: str, needed: tuple[int, ...]
) -> None:
    if found != needed:
        raise StartupError(
            f"{a.file}: {a.name} and {b.name} change a weight of shape {found}, and {name} of the base model has the "
            f"shape {needed}: the adapter is of another model."
        )
