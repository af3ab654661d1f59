"""Linear layers, and embeddings tied to them.

On a CPU, products with a packed weight are two to three times as fast (see docs/performance.md). The plain weight is
not kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastserve.engine.layers.layouts.layout import EmbeddingLayout, WeightLayout


class Linear(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """y = x W^T + b, plus the output of LoRA adapters."""

    def __init__(self, weight: WeightLayout, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.layout = weight
        self.bias = bias
        self.delta: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        """Adds the output of the batch's adapters for `x` (..., in) to the layer's own (..., out), in place."""

    @property
    def weight(self) -> torch.Tensor:
        """A plain tensor (out, in), for model code that reads it. A packed weight is unpacked on each call."""
        return self.layout.get()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layout.product(x, self.bias)
        if self.delta is not None:
            self.delta(x, out)
        return out


class TiedEmbedding(torch.nn.Module):  # type: ignore[misc]
    """An embedding that shares the weight of a linear layer."""

    def __init__(self, layout: EmbeddingLayout, original: torch.nn.Embedding) -> None:
        super().__init__()
        self.layout = layout
        self.embedding_dim = original.embedding_dim
        self.scalar_embed_scale = embedding_scale(original)

    @property
    def weight(self) -> torch.Tensor:
        """A plain tensor (vocabulary, hidden), for model code that reads it. A packed weight is unpacked on each
        call."""
        return self.layout.get()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.layout.rows(ids)
        scale = self.scalar_embed_scale
        return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype)


def embedding_scale(embedding: torch.nn.Module) -> float:
    """Factor applied to the embedding's rows: 1 except in Gemma's models."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def can_be_tied(module: torch.nn.Module) -> bool:
    """Whether a TiedEmbedding can replace the module. Unknown subclasses of Embedding may compute something else."""
    return type(module) is torch.nn.Embedding or hasattr(module, "scalar_embed_scale")
