"""Layers of a model that is divided over ranks: each rank has a part of the weight, and the ranks exchange what is
missing.

An exchange stands in the layer, not in the layout of its weight: what adapters add to a partial sum is then summed with
it. All ranks get the same bits, so what every rank computes alone (norms, routers) is the same on all of them.
"""

from __future__ import annotations

import torch

from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.linear import Linear
from fastserve.engine.ranks.collectives import Collectives


class RowParallelLinear(Linear):
    """Each rank has some of the inputs: the product is a sum over ranks. Its whole bias is added once."""

    def __init__(self, weight: WeightLayout, bias: torch.Tensor | None, collectives: Collectives) -> None:
        super().__init__(weight, bias)
        self.collectives = collectives

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        partial = self.layout.product(x, None)
        if self.delta is not None:
            self.delta(x, partial)
        out = self.collectives.all_reduce(partial)
        return out if self.bias is None else out + self.bias


class VocabParallelHead(Linear):
    """An LM head of which each rank has the logits of some tokens: they are concatenated on every rank."""

    def __init__(self, weight: WeightLayout, bias: torch.Tensor | None, collectives: Collectives) -> None:
        super().__init__(weight, bias)
        self.collectives = collectives

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_gather(super().forward(x))


class VocabParallelEmbedding(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """An embedding of which each rank has the rows of some tokens; the other ranks add zeros."""

    def __init__(self, part: torch.nn.Module, first: int, count: int, collectives: Collectives) -> None:
        """`part`: the embedding of the tokens `first` to `first + count - 1`."""
        super().__init__()
        self.part = part
        self.first = first
        self.count = count
        self.collectives = collectives

    @property
    def embedding_dim(self) -> int:
        size: int = self.part.embedding_dim
        return size

    @property
    def weight(self) -> torch.Tensor:
        """The rank's rows (tokens, hidden)."""
        return self.part.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.first
        is_own = (local >= 0) & (local < self.count)
        rows = self.part(torch.where(is_own, local, 0))
        return self.collectives.all_reduce(rows * is_own.unsqueeze(-1))


class ParallelRMSNorm(torch.nn.Module):  # type: ignore[misc]
    """An RMS norm over channels of all ranks: they sum the squares, one number for each row."""

    def __init__(self, original: torch.nn.Module, width: int, collectives: Collectives, *, counts: bool) -> None:
        """`original` with the rank's part of the weight. `width`: number of channels on all ranks. `counts`: False
        where another rank has the same channels and adds them."""
        super().__init__()
        self.weight = original.weight
        self.width = width
        self.counts = counts
        self.collectives = collectives
        self.variance_epsilon = float(
            getattr(original, "variance_epsilon", None) or getattr(original, "eps", None) or 0.0
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        squares = values.pow(2).sum(-1, keepdim=True)
        total = self.collectives.all_reduce(squares if self.counts else torch.zeros_like(squares))
        normed = values * torch.rsqrt(total / self.width + self.variance_epsilon)
        out: torch.Tensor = (self.weight * normed).to(x.dtype)
        return out
