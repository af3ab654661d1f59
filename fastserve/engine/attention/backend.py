"""The contract of an attention backend, which computes paged attention on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastserve.engine.attention.metadata import AttentionMetadata, AttentionParams, LayerShape
from fastserve.engine.kernels.device_step import DeviceStep

KVCache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, in blocks; the layout within a block is the backend's own."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """Size of the largest step that an engine may run."""

    num_tokens: int
    num_seqs: int
    context: int
    """Tokens of the longest sequence."""


class AttentionBackend(Protocol):
    """Computes all layers on one device."""

    takes_device_steps: bool
    """Whether it can compute from a `DeviceStep`, whose arrays are on the device, so that steps can be recorded."""

    def make_cache(self, shape: LayerShape, num_blocks: int) -> KVCache:
        """The KV cache of one layer."""
        ...

    def bytes_per_token(self, shape: LayerShape) -> int:
        """Bytes of one token in one layer's KV cache."""
        ...

    def workspace_bytes(self, shapes: Sequence[LayerShape], size: StepSize) -> int:
        """Maximum memory of a call in bytes, over all layers, without its inputs and its output."""
        ...

    def __call__(
        self,
        step: AttentionMetadata | DeviceStep,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: KVCache,
        params: AttentionParams,
    ) -> torch.Tensor:
        """Store the new keys and values in the KV cache, and compute causal attention within each sequence.

        `query` (tokens, heads, key dim), `key` and `value` (tokens, KV heads, dim) -> (tokens, heads, value dim). A
        DeviceStep is passed only where `takes_device_steps`.
        """
        ...
