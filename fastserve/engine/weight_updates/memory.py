"""Memory of updates on the CPU that is used again by later ones.

The first write to new pages takes longer than receiving a weight, or packing it. Between updates the system may take
these pages when it needs memory (`offer_pages`), so they count as available.
"""

from __future__ import annotations

import torch

from fastserve.engine.huge_pages import offer_pages, zeros
from fastserve.engine.layers.layouts.layout import Memo

_SMALL_BYTES = 1 << 16


class UpdateMemory:
    """Used by one thread at a time."""

    def __init__(self) -> None:
        self._copies: Memo = {}
        self._buffers: list[torch.Tensor] = []
        """Free ones, the smallest first."""

    def memo(self) -> Memo:
        """For copies of weights, in the memory of those before."""
        return dict(self._copies)

    def keep(self, memo: Memo) -> None:
        """Keep the memory of copies, which nobody uses any longer, and that of free buffers."""
        copies = {key: made for key, made in memo.items() if isinstance(key, tuple)}
        self._copies = {key: made for key, made in copies.items() if _is_worth_keeping(made)}
        self._buffers = [one for one in self._buffers if _is_worth_keeping(one)]
        offer_pages([*self._copies.values(), *self._buffers])

    def drop(self) -> None:
        self._copies = {}
        self._buffers = []

    def take_buffer(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """At least so many bytes, for a broadcast."""
        for number, one in enumerate(self._buffers):
            if one.numel() >= num_bytes and one.device == device:
                return self._buffers.pop(number)
        self._buffers[:1] = []  # it is too small
        if device.type == "cpu":
            return zeros((num_bytes,), torch.uint8)
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._buffers.append(buffer)
        self._buffers.sort(key=torch.Tensor.numel)


def _is_worth_keeping(memory: torch.Tensor) -> bool:
    """Not on GPUs, whose allocator does so, and not if it is quicker to make it anew."""
    num_bytes: int = memory.numel() * memory.element_size()
    return bool(memory.device.type == "cpu" and num_bytes >= _SMALL_BYTES)
