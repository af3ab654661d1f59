"""Positions for layers that count them from the length of the cache.

transformers' attention of Llama 4 scales its queries by position, which it takes from the number of cached tokens and
not from `position_ids`. In a packed batch there is no such cache, and each sequence has its own number. So these layers
get a stand-in for the cache, whose length is a tensor: what has to be added to a token's row for its position.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


class PackedPositions:
    """Stands in for a cache: it knows positions, and leaves keys and values as they are."""

    def __init__(self, position_ids: torch.Tensor) -> None:
        """`position_ids` (1, tokens)"""
        self._positions = position_ids[0]

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """(tokens,) number that a token's row in the batch lacks to its position"""
        return self._positions - torch.arange(len(self._positions), device=self._positions.device)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


def give_positions(model: PreTrainedModel) -> None:
    """Give each token's position to the layers of `model` that scale queries by the length of the cache."""
    for layer in model.modules():
        if any(getattr(child, "attn_temperature_tuning", False) for child in layer.children()):
            layer.forward = _WithPositions(layer.forward)


class _WithPositions:
    """The forward pass of a decoder layer, with a cache that knows positions."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(
        self, hidden_states: torch.Tensor, *, position_ids: torch.Tensor, cache: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """`hidden_states` (sequences, tokens, hidden), `position_ids` (sequences or 1, tokens); the other tensors are
        of each sequence or of all."""
        if cache is not None:
            raise ValueError("a cache of the model's own is not supported")
        rows = []
        for row, hidden in enumerate(hidden_states.split(1)):
            of_row = {name: _row(value, row) for name, value in kwargs.items()}
            positions = _row(position_ids, row)
            rows.append(self._forward(hidden, position_ids=positions, cache=PackedPositions(positions), **of_row))
        return torch.cat(rows)


def _row(value: Any, row: int) -> Any:
    """The part of a tensor that belongs to one sequence."""
    return value[row : row + 1] if isinstance(value, torch.Tensor) and value.shape[0] > 1 else value
