"""All weights of a model by their Hugging Face names, however each is stored.

Whatever changes weights (live updates) reads and writes through this table, and knows nothing of packing, ties or
transposed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Place:
    """Where one copy of a weight lives."""

    get: Callable[[], torch.Tensor]
    set: Callable[[torch.Tensor], object]


class WeightTable:
    """Made by `assembly.Assembly`, which gives the weights their places."""

    def __init__(self, places: dict[str, list[Place]], shapes: Mapping[str, torch.Size]) -> None:
        """`places` of each name: its own and those of the weights tied to it, in the same order for all of them. Some
        may be one and the same."""
        self._places = {name: list(dict.fromkeys(found)) for name, found in places.items()}
        self._shapes = shapes

    def names(self) -> list[str]:
        return list(self._places)

    @property
    def num_parameters(self) -> int:
        """Tied weights count once."""
        first_of = {id(places[0]): name for name, places in reversed(self._places.items())}
        return sum(self._shapes[name].numel() for name in first_of.values())

    def get(self, name: str) -> torch.Tensor:
        """The weight in the checkpoint's shape. Raises KeyError for a name that the model does not have."""
        return self._find(name)[0].get()

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a weight, in all places where it is used. Raises KeyError, or ValueError for another shape."""
        places = self._find(name)
        if tensor.shape != self._shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(self._shapes[name])}, not {tuple(tensor.shape)}")
        with torch.no_grad():
            for place in places:
                place.set(tensor)

    def _find(self, name: str) -> list[Place]:
        try:
            return self._places[name]
        except KeyError:
            raise KeyError(f"the model has no weight {name!r}") from None
