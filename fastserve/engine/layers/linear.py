"""Linear layers, and embeddings that share their weight.

On a CPU, products are two to three times as fast with a weight in an order of its own (see docs/performance.md). The
plain weight is dropped, not kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastserve.engine.layers.layouts.layout import EmbeddingLayout, WeightLayout


class Linear(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """y = x W^T + b, and what adapters add to it."""

    def __init__(self, weight: WeightLayout, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.layout = weight
        self.bias = bias
        self.delta: Callable[[torch.Tensor], torch.Tensor] | None = None
        """For `x` (..., in) of a packed batch, what the adapters of its sequences add: (..., out)."""

    @property
    def weight(self) -> torch.Tensor:
        """A plain tensor (out, in), for model code that looks at it; made anew when the weight is packed."""
        return self.layout.get()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layout.product(x, self.bias)
        return out if self.delta is None else out + self.delta(x)


class TiedEmbedding(torch.nn.Module):  # type: ignore[misc]
    """An embedding whose rows are the weights of a linear layer, which are kept once."""

    def __init__(self, layout: EmbeddingLayout, like: torch.nn.Embedding) -> None:
        super().__init__()
        self.layout = layout
        self.embedding_dim = like.embedding_dim
        self.scalar_embed_scale = embedding_scale(like)

    @property
    def weight(self) -> torch.Tensor:
        """A plain tensor (vocabulary, hidden), for model code that looks at it; made anew when the weight is packed."""
        return self.layout.get()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.layout.rows(ids)
        scale = self.scalar_embed_scale
        return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype)


def embedding_scale(embedding: torch.nn.Module) -> float:
    """What an embedding's rows are multiplied with: 1, but in Gemma's models."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def can_be_tied(module: torch.nn.Module) -> bool:
    """Whether a TiedEmbedding can take its place: other subclasses may compute something else."""
    return type(module) is torch.nn.Embedding or hasattr(module, "scalar_embed_scale")
