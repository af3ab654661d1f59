"""Base weights as training changed them before it began. An adapter's file does not have them, but they follow from the
base model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class WithoutPrincipal:
    """PiSSA (Meng et al., 2024): the adapter began as the largest singular values, which the base lost."""

    rank: int

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return weight - (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]


@dataclass(frozen=True, slots=True)
class WithoutOrthonormal:
    """OLoRA (Büyükakyüz, 2024): the adapter began as the first columns of Q and rows of R."""

    rank: int
    scale: float

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        q, r = torch.linalg.qr(weight)
        return weight - (q[:, : self.rank] @ r[: self.rank]) * self.scale


@dataclass(frozen=True, slots=True)
class WithoutMinor:
    """KaSA (Wang et al., 2024): the base lost its smallest singular values."""

    rank: int

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        kept = max(0, len(s) - self.rank)
        return (u[:, :kept] * s[:kept]) @ v[:kept]
