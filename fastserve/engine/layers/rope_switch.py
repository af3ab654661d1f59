"""Rotary embeddings whose frequencies depend on the length of the sequence (LongRoPE), in packed batches.

transformers takes the frequencies of the longest sequence of a batch for all of it. Here each sequence has those of its
own length, in a packed batch as in the model's own forward pass: the model's module is computed twice, with positions
by which it chooses the ones and the others, and each token takes its row. So nothing of a module is known but that it
switches beyond a length.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from fastserve.engine.attention.paged import PagedAttention
from fastserve.engine.layers.modules import replace_module


class SwitchedRotary(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """A rotary embedding with the frequencies of each token's own sequence."""

    def __init__(self, inner: torch.nn.Module, attention: PagedAttention, length: int) -> None:
        """`inner` has other frequencies where the longest position is `length` or more."""
        super().__init__()
        self.inner = inner
        self.rope_type = inner.rope_type
        self._attention = attention
        self._length = length

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Cosines and sines of `inner` for `position_ids` (..., tokens): tensors (..., tokens, dim)."""
        is_long = self._is_long(position_ids)
        beyond = position_ids.new_full((*position_ids.shape[:-1], 1), self._length)
        short = self.inner(x, position_ids.masked_fill(is_long, 0), *args, **kwargs)
        long = self.inner(x, torch.cat([position_ids, beyond], dim=-1), *args, **kwargs)
        which = is_long.unsqueeze(-1)
        if isinstance(short, torch.Tensor):
            return torch.where(which, long[..., :-1, :], short)
        return tuple(torch.where(which, one[..., :-1, :], other) for one, other in zip(long, short, strict=True))

    def _is_long(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(..., tokens) whether each token's sequence is longer than the switch"""
        is_far = position_ids >= self._length
        if not self._attention.is_running:  # each row is a sequence
            return is_far.any(dim=-1, keepdim=True).expand_as(is_far)
        is_long = self._attention.is_long(position_ids.device)
        return is_far if is_long is None else is_far | is_long.bool()


def switch_rope_by_sequence(model: PreTrainedModel, attention: PagedAttention, length: int | None) -> None:
    """Have rotary embeddings of `model` switch by each sequence's own length, if they do so beyond `length`."""
    if length is None:
        return
    for path, module in list(model.named_modules()):
        kinds = getattr(module, "rope_type", None)
        if "longrope" in (kinds.values() if isinstance(kinds, dict) else [kinds]):
            replace_module(model, path, SwitchedRotary(module, attention, length))
