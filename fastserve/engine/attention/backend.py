"""The contract of an attention backend: who computes paged attention on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastserve.engine.attention.metadata import AttentionMetadata, AttentionParams, LayerShape
from fastserve.engine.kernels.device_step import DeviceStep

KVCache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, in blocks; the order within a block is the backend's own."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """The largest step that an engine may take."""

    num_tokens: int
    num_seqs: int
    context: int
    """tokens of the longest sequence"""


class AttentionBackend(Protocol):
    """Serves all layers on one device."""

    takes_device_steps: bool
    """Whether it computes from a `DeviceStep` alone, whose arrays lie on the device: such steps can be recorded."""

    def make_cache(self, shape: LayerShape, num_blocks: int) -> KVCache:
        """The KV cache of one layer."""
        ...

    def bytes_per_token(self, shape: LayerShape) -> int:
        """Of one layer's KV cache."""
        ...

    def workspace_bytes(self, shapes: Sequence[LayerShape], size: StepSize) -> int:
        """Memory that a call takes beside its inputs and its output, for the widest of the layers."""
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
        """Store the new keys and values, and let every token look at its own sequence.

        `query` (tokens, heads, key dim), `key` and `value` (tokens, KV heads, dim) -> (tokens, heads, value dim). A
        DeviceStep comes only where `takes_device_steps`.
        """
        ...
