"""Access to all weights of a model by their Hugging Face names, whatever their layout.

Live weight updates read and write through this table, independent of packing, ties and transposed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Read and write access to one stored copy of a weight, in the checkpoint's shape."""

    get: Callable[[], torch.Tensor]
    set: Callable[[torch.Tensor], object]


class WeightTable:
    """Created by `assembly.Assembly`."""

    def __init__(self, slots: dict[str, list[WeightSlot]], shapes: Mapping[str, torch.Size]) -> None:
        """`slots`: for each name, its own slot and those of the weights tied to it, in the same order for each of these
        names. Duplicates are allowed."""
        self._slots = {name: list(dict.fromkeys(found)) for name, found in slots.items()}
        self._shapes = shapes

    def names(self) -> list[str]:
        return list(self._slots)

    @property
    def num_parameters(self) -> int:
        """Number of parameters; tied weights count once."""
        first_of = {id(slots[0]): name for name, slots in reversed(self._slots.items())}
        return sum(self._shapes[name].numel() for name in first_of.values())

    def get(self, name: str) -> torch.Tensor:
        """The weight in the checkpoint's shape. Raises KeyError for a name that the model does not have."""
        return self._find(name)[0].get()

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a weight and those tied to it. Raises KeyError, or ValueError for another shape."""
        slots = self._find(name)
        if tensor.shape != self._shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(self._shapes[name])}, not {tuple(tensor.shape)}")
        with torch.no_grad():
            for slot in slots:
                slot.set(tensor)

    def _find(self, name: str) -> list[WeightSlot]:
        try:
            return self._slots[name]
        except KeyError:
            raise KeyError(f"the model has no weight {name!r}") from None
