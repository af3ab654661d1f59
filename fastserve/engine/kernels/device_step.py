"""Attention metadata of a step as tensors on the device, for kernels on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int32]
Send = Callable[[Sequence[npt.NDArray[Any]]], list[torch.Tensor]]
"""Copies arrays to the device, in one transfer."""


@dataclass(frozen=True, slots=True)
class WorkItems:
    """A step's work for the attention kernel; each item is (sequence, index of its first new token)."""

    narrow: tuple[torch.Tensor, torch.Tensor]
    """Whole sequences with few new tokens."""
    num_narrow: int
    max_narrow_tokens: int
    """Maximum number of new tokens in a narrow item."""
    wide: tuple[torch.Tensor, torch.Tensor]
    """Parts of chunks, longest context first."""
    num_wide: int


@dataclass(slots=True)
class DeviceStep:
    """All tensors are int32. Rows that pad the batch have sequence length 0 and slot -1."""

    starts: torch.Tensor
    """(sequences,) row of the batch of each sequence's first new token"""
    counts: torch.Tensor
    """(sequences,) number of new tokens"""
    seq_lens: torch.Tensor
    """(sequences,) tokens of each sequence so far, including the new ones"""
    block_table: torch.Tensor
    """(sequences, max blocks) block ids of each sequence"""
    slot_mapping: torch.Tensor
    """(tokens,) block * block size + offset of each new token's key and value; -1: not stored"""
    host_counts: IntArray
    """`counts` on the host."""
    host_seq_lens: IntArray
    """`seq_lens` on the host."""
    send: Send
    is_long: torch.Tensor | None = None
    """(tokens,) whether each token's sequence has the rotary frequencies of long ones; None: none has"""
    fixed_items: WorkItems | None = None
    """Work items that do not depend on the kernel's tiles: one new token for each sequence."""
    items_by_size: dict[tuple[int, int], WorkItems] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        starts: IntArray,
        counts: IntArray,
        positions: IntArray,
        block_table: IntArray,
        slot_mapping: IntArray,
        send: Send,
    ) -> DeviceStep:
        """`positions` (sequences,): position of each sequence's first new token."""
        seq_lens = positions + counts
        tensors = send((starts, counts, seq_lens, block_table, slot_mapping))
        return cls(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], counts, seq_lens, send)

    def items(self, narrow_tokens: int, wide_tokens: int) -> WorkItems:
        """Narrow items of at most `narrow_tokens` tokens and wide ones of `wide_tokens`, computed once for all
        layers."""
        if self.fixed_items is not None:
            return self.fixed_items
        found = self.items_by_size.get((narrow_tokens, wide_tokens))
        if found is None:
            found = self.items_by_size[narrow_tokens, wide_tokens] = self._make_items(narrow_tokens, wide_tokens)
        return found

    def _make_items(self, narrow_tokens: int, wide_tokens: int) -> WorkItems:
        is_narrow = self.host_counts <= narrow_tokens
        narrow = np.flatnonzero(is_narrow).astype(np.int32)
        # Longest contexts first: short ones at the end make the multiprocessors finish together.
        narrow = narrow[np.argsort(-self.host_seq_lens[narrow], kind="stable")]
        chunks = np.flatnonzero(~is_narrow).astype(np.int32)
        per_chunk = -(-self.host_counts[chunks] // wide_tokens)
        wide = np.repeat(chunks, per_chunk)
        ends = np.cumsum(per_chunk, dtype=np.int32)
        first = (np.arange(len(wide), dtype=np.int32) - np.repeat(ends - per_chunk, per_chunk)) * wide_tokens
        last = self.host_seq_lens[wide] - self.host_counts[wide] + first
        order = np.argsort(-last, kind="stable")
        zeros = np.zeros(len(narrow), dtype=np.int32)
        tensors = self.send((narrow, zeros, wide[order], first[order].astype(np.int32)))
        max_tokens = int(self.host_counts[narrow].max(initial=0))
        return WorkItems((tensors[0], tensors[1]), len(narrow), max_tokens, (tensors[2], tensors[3]), len(wide))
