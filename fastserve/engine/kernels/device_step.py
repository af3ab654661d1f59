"""Where the tokens of a step lie, as tensors on the device: what kernels on GPUs read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int32]
Send = Callable[[Sequence[npt.NDArray[Any]]], list[torch.Tensor]]
"""Brings arrays to the device, in one transfer."""


@dataclass(frozen=True, slots=True)
class Items:
    """How a step is cut for the attention kernel; each item is (sequence, first new token of it)."""

    narrow: tuple[torch.Tensor, torch.Tensor]
    """Whole sequences of few new tokens."""
    num_narrow: int
    most_narrow_tokens: int
    wide: tuple[torch.Tensor, torch.Tensor]
    """Parts of chunks, those that see the longest contexts first."""
    num_wide: int


@dataclass(slots=True)
class DeviceStep:
    """All tensors are int32. Rows that only pad the batch have a context of 0 and a slot of -1."""

    starts: torch.Tensor
    """(sequences,) row of the batch of each sequence's first new token"""
    counts: torch.Tensor
    """(sequences,) new tokens"""
    contexts: torch.Tensor
    """(sequences,) tokens in each context, the new ones included"""
    block_table: torch.Tensor
    """(sequences, most blocks)"""
    slots: torch.Tensor
    """(tokens,) block * block size + offset of each new token's key and value; -1: not stored"""
    host_counts: IntArray
    host_contexts: IntArray
    send: Send
    fixed: Items | None = None
    """Of a step whose cut does not depend on the kernel: one new token for each sequence."""
    cut: dict[tuple[int, int], Items] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        starts: IntArray,
        counts: IntArray,
        positions: IntArray,
        block_table: IntArray,
        slots: IntArray,
        send: Send,
    ) -> DeviceStep:
        """`positions` (sequences,) of each sequence's first new token."""
        contexts = positions + counts
        tensors = send((starts, counts, contexts, block_table, slots))
        return cls(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], counts, contexts, send)

    def items(self, narrow_tokens: int, wide_tokens: int) -> Items:
        """Cut into narrow items of at most `narrow_tokens` and wide ones of `wide_tokens`; the first layer that asks
        pays, the others find it done."""
        if self.fixed is not None:
            return self.fixed
        found = self.cut.get((narrow_tokens, wide_tokens))
        if found is None:
            found = self.cut[narrow_tokens, wide_tokens] = self._cut(narrow_tokens, wide_tokens)
        return found

    def _cut(self, narrow_tokens: int, wide_tokens: int) -> Items:
        is_narrow = self.host_counts <= narrow_tokens
        narrow = np.flatnonzero(is_narrow).astype(np.int32)
        # The longest contexts first: what is left for the end is short, so the multiprocessors end together.
        narrow = narrow[np.argsort(-self.host_contexts[narrow], kind="stable")]
        chunks = np.flatnonzero(~is_narrow).astype(np.int32)
        per_chunk = -(-self.host_counts[chunks] // wide_tokens)
        wide = np.repeat(chunks, per_chunk)
        ends = np.cumsum(per_chunk, dtype=np.int32)
        first = (np.arange(len(wide), dtype=np.int32) - np.repeat(ends - per_chunk, per_chunk)) * wide_tokens
        last = self.host_contexts[wide] - self.host_counts[wide] + first
        order = np.argsort(-last, kind="stable")
        zeros = np.zeros(len(narrow), dtype=np.int32)
        tensors = self.send((narrow, zeros, wide[order], first[order].astype(np.int32)))
        most = int(self.host_counts[narrow].max(initial=0))
        return Items((tensors[0], tensors[1]), len(narrow), most, (tensors[2], tensors[3]), len(wide))
