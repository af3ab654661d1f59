"""What attention must know of a step, and of a layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int32]


@dataclass(slots=True)
class AttentionMetadata:
    """Where the tokens of a step lie in the batch and in the KV cache.

    Sequences with one new token come before those with several.
    """

    starts: IntArray
    """(sequences,) row of the batch of each sequence's first new token"""
    counts: IntArray
    """(sequences,) new tokens"""
    positions: IntArray
    """(sequences,) position in the sequence of the first new token"""
    block_table: IntArray
    """(sequences, most blocks) blocks of each sequence; beyond its own stands any valid block"""
    token_block: IntArray
    """(tokens,) block that each new token's key and value go to"""
    token_offset: IntArray
    """(tokens,) and place in it"""
    cache: dict[Any, Any] = field(default_factory=dict)
    """What a backend makes of this for the first layer, for all other layers of the step."""

    @property
    def num_decodes(self) -> int:
        return int((self.counts == 1).sum())


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer's attention looks like."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float = 1.0
    softcap: float | None = None
    window: int | None = None
    has_sinks: bool = False

    def without_window(self) -> LayerShape:
        """The window is what differs between the layers of one model."""
        return dataclasses.replace(self, window=None)


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """How the scores of one call become weights."""

    scaling: float
    window: int | None = None
    """Each token sees so many tokens, itself included."""
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """(heads,) logits that take part in the softmax and stand for no token (GPT-OSS)"""
