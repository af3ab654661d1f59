"""Access to all weights of a model by their Hugging Face names, whatever their layout.

Live weight updates read and write through this table, independent of packing, ties and transposed layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from fastserve.engine.layers.layouts.layout import Memo, WeightLayout, memory_like


class WeightSlot(Protocol):
    """Read and write access to one stored copy of a weight, in the checkpoint's shape."""

    def get(self) -> torch.Tensor: ...

    def set(self, weight: torch.Tensor) -> None: ...

    def copied(self, memo: Memo) -> WeightSlot:
        """A slot for the same weight with memory of its own, whose values are undefined until `set`."""
        ...

    def take_over(self, other: Any) -> None:
        """Take over the weight of a slot that `copied` made, at the addresses that kernels know."""
        ...

    def tensors(self) -> Sequence[torch.Tensor]:
        """The memory that `set` writes in place."""
        ...


class ParameterSlot:
    """A plain parameter."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._parameter = parameter

    def get(self) -> torch.Tensor:
        return self._parameter.data

    def set(self, weight: torch.Tensor) -> None:
        self._parameter.copy_(weight)

    def copied(self, memo: Memo) -> ParameterSlot:
        return ParameterSlot(memory_like(self._parameter.data, memo))

    def take_over(self, other: ParameterSlot) -> None:
        self._parameter.copy_(other._parameter)

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self._parameter.data,)


class LayoutSlot:
    """The weight of a linear layer."""

    def __init__(self, layout: WeightLayout, *, transposed: bool) -> None:
        """`transposed`: the checkpoint has it as (in, out)."""
        self._layout = layout
        self._transposed = transposed

    def get(self) -> torch.Tensor:
        weight = self._layout.get()
        return weight.t().contiguous() if self._transposed else weight

    def set(self, weight: torch.Tensor) -> None:
        self._layout.set(weight.t().contiguous() if self._transposed else weight)

    def copied(self, memo: Memo) -> LayoutSlot:
        return LayoutSlot(self._layout.copied(memo), transposed=self._transposed)

    def take_over(self, other: LayoutSlot) -> None:
        self._layout.take_over(other._layout)

    def tensors(self) -> Sequence[torch.Tensor]:
        return self._layout.tensors()


class ExpertsSlot:
    """The weights of all experts of a layer, (experts, ...)."""

    def __init__(self, slots: Sequence[LayoutSlot]) -> None:
        self._slots = slots

    def get(self) -> torch.Tensor:
        return torch.stack([slot.get() for slot in self._slots])

    def set(self, weight: torch.Tensor) -> None:
        for slot, one in zip(self._slots, weight, strict=True):
            slot.set(one)

    def copied(self, memo: Memo) -> ExpertsSlot:
        return ExpertsSlot([slot.copied(memo) for slot in self._slots])

    def take_over(self, other: ExpertsSlot) -> None:
        for slot, one in zip(self._slots, other._slots, strict=True):
            slot.take_over(one)

    def tensors(self) -> Sequence[torch.Tensor]:
        return [tensor for slot in self._slots for tensor in slot.tensors()]


class WeightTable:
    """Created by `assembly.Assembly`."""

    def __init__(
        self,
        slots: Mapping[str, Sequence[WeightSlot]],
        shapes: Mapping[str, torch.Size],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """`slots`: for each name, its own slot and those of the weights tied to it, in the same order for each of these
        names. Duplicates are allowed."""
        self._slots = {name: list(dict.fromkeys(found)) for name, found in slots.items()}
        self._shapes = shapes
        self._dtypes = dtypes
        tied: dict[WeightSlot, list[str]] = {}
        for name, found in self._slots.items():
            tied.setdefault(found[0], []).append(name)
        self._tied = {name: names for names in tied.values() for name in names}

    def names(self) -> list[str]:
        return list(self._slots)

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the model computes this weight in, whatever its layout."""
        return self._dtypes[name]

    def tied_names(self, name: str) -> list[str]:
        """All names of the same weight, this one included."""
        return self._tied[name]

    @property
    def num_parameters(self) -> int:
        """Number of parameters; tied weights count once."""
        return sum(self._shapes[name].numel() for name, names in self._tied.items() if name == names[0])

    def get(self, name: str) -> torch.Tensor:
        """The weight in the checkpoint's shape. Raises KeyError for a name that the model does not have."""
        return self.slots(name)[0].get()

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a weight and those tied to it. Raises KeyError, or ValueError for another shape."""
        slots = self.slots(name)
        if tensor.shape != self._shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(self._shapes[name])}, not {tuple(tensor.shape)}")
        with torch.no_grad():
            for slot in slots:
                slot.set(tensor)

    def slots(self, name: str) -> list[WeightSlot]:
        """Raises KeyError for a name that the model does not have."""
        try:
            return self._slots[name]
        except KeyError:
            raise KeyError(f"the model has no weight {name!r}") from None
