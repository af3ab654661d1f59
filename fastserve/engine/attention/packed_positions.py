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
    """Give packed positions to the layers of `model` that scale queries by the length of the cache."""
    for layer in model.modules():
        if any(getattr(child, "attn_temperature_tuning", False) for child in layer.children()):
            layer.register_forward_pre_hook(_with_positions, with_kwargs=True)


def _with_positions(
    _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    position_ids = kwargs.get("position_ids")
    # With a batch of several sequences, or a cache of its own, it is the model's own forward pass.
    if position_ids is None or position_ids.shape[0] != 1 or kwargs.get("cache") is not None:
        return None
    return args, kwargs | {"cache": PackedPositions(position_ids)}
