"""Inputs of attention that describe a step, and parameters of a layer's attention."""

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
    """Positions of a step's tokens in the batch and in the KV cache.

    Sequences with one new token (decodes) come before those with several.
    """

    starts: IntArray
    """(sequences,) row of the batch of each sequence's first new token"""
    counts: IntArray
    """(sequences,) number of new tokens"""
    positions: IntArray
    """(sequences,) position of the first new token in its sequence"""
    block_table: IntArray
    """(sequences, max blocks) block ids of each sequence, padded with any valid ids"""
    token_block: IntArray
    """(tokens,) block id for each new token's key and value"""
    token_offset: IntArray
    """(tokens,) and the offset in this block"""
    is_long: npt.NDArray[np.bool_] | None = None
    """(tokens,) whether each token's sequence has the rotary frequencies of long ones; None: none has"""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Arrays that a backend derives from the metadata in the first layer and reuses in the others."""

    @property
    def num_decodes(self) -> int:
        return int((self.counts == 1).sum())


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape and settings of one layer's attention."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float = 1.0
    softcap: float | None = None
    window: int | None = None
    has_sinks: bool = False
    chunk: int | None = None

    def without_window(self) -> LayerShape:
        """For comparing layers of one model, which may differ in the window only."""
        return dataclasses.replace(self, window=None)


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """Parameters of one call of attention."""

    scaling: float
    window: int | None = None
    """Sliding window: number of tokens that each token attends to, itself included."""
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """(heads,) attention sinks: logits in the softmax that belong to no token (GPT-OSS)"""
    chunk: int | None = None
    """Size of the chunks that a sequence is cut into: no token attends to those before its own chunk (Llama 4)."""
