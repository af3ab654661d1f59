"""The interface of weight layouts: how the weight of a linear layer is stored and multiplied with.

A new layout (another quantization, sharding over ranks) is one more file with a class that has these methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from fastserve.engine.kernels.packed_linear import WeightStruct


def copied_tensor(tensor: torch.Tensor, memo: dict[Any, Any]) -> torch.Tensor:
    """A deep copy with `copy.deepcopy`'s memo, in which views of one memory stay such; several times as fast."""
    storage = tensor.untyped_storage()
    key = ("storage", storage.data_ptr())
    if key not in memo:
        if tensor.is_contiguous() and tensor.nbytes == storage.nbytes():
            whole = tensor.clone()
            memo[key] = whole.untyped_storage()
            return whole
        memo[key] = storage.clone()
    copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return copied.set_(memo[key], tensor.storage_offset(), tensor.size(), tensor.stride())


class WeightLayout(Protocol):
    """A stored weight of shape (out, in)."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` (..., in) -> (..., out)"""
        ...

    def partial_product(self, x: torch.Tensor) -> torch.Tensor:
        """As `product`, without bias, for a sum over ranks that is rounded once: in float32 if the layout's kernel can,
        otherwise rounded to the dtype of `x`."""
        ...

    def get(self) -> torch.Tensor:
        """The weight as a plain tensor (out, in)."""
        ...

    def set(self, weight: torch.Tensor) -> None:
        """Overwrite it with `weight` (out, in)."""
        ...

    def take_over(self, other: Any) -> None:
        """Take over the weight of a deep copy of this layout, without another conversion and at the same addresses:
        structs and recorded graphs stay valid."""
        ...

    def part(self, rows: slice) -> WeightLayout:
        """The layout of some of its rows (outputs), sharing its memory."""
        ...

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        """C struct describing this weight for CPU kernels, or None if unsupported. Its pointers are valid as long as
        this object and `bias` live, also after `set`."""
        ...


@runtime_checkable
class EmbeddingLayout(WeightLayout, Protocol):
    """A layout that a tied embedding can share."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight: `ids` (...) -> (..., in)"""
        ...


class RowsOfWeight:
    """Some rows of a weight whose layout cannot be sliced: it is unpacked for each use."""

    def __init__(self, whole: WeightLayout, rows: slice) -> None:
        self._whole = whole
        self._rows = rows

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.get(), bias)

    def partial_product(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, None)

    def get(self) -> torch.Tensor:
        return self._whole.get()[self._rows]

    def set(self, weight: torch.Tensor) -> None:
        whole = self._whole.get().clone()
        whole[self._rows] = weight
        self._whole.set(whole)

    def take_over(self, other: RowsOfWeight) -> None:
        self._whole.take_over(other._whole)

    def part(self, rows: slice) -> WeightLayout:
        return RowsOfWeight(self._whole, slice(self._rows.start + rows.start, self._rows.start + rows.stop))

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        return None


Across = Callable[[torch.Tensor], torch.Tensor]
"""Maximum over all ranks of each value"""
Quantize = Callable[[torch.Tensor, torch.dtype, Across | None], WeightLayout]
"""(weight (out, in), compute dtype, for a weight of which each rank has some inputs: maximum over the ranks) ->
quantized layout"""
