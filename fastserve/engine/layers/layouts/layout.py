"""The interface of weight layouts: how the weight of a linear layer is stored and multiplied with.

A new layout (another quantization, sharding over ranks) is one more file with a class that has these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from fastserve.engine.huge_pages import zeros
from fastserve.engine.kernels.packed_linear import WeightStruct

Memo = dict[Any, Any]
"""The memo of `copy.deepcopy`: memory that several copies share is made once. `memory_like` has tuples as its keys."""


def memory_like(tensor: torch.Tensor, memo: Memo) -> torch.Tensor:
    """Memory for a copy, in huge pages on CPUs, with undefined values. Views of one memory stay such."""
    storage = tensor.untyped_storage()
    key = (storage.data_ptr(), storage.nbytes())
    if key not in memo:
        size = (storage.nbytes(),)
        on_cpu = tensor.device.type == "cpu"
        made = zeros(size, torch.uint8) if on_cpu else torch.empty(size, dtype=torch.uint8, device=tensor.device)
        memo[key] = made
    made = memo[key]
    offset = made.storage_offset() // tensor.element_size() + tensor.storage_offset()
    copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return copied.set_(made.untyped_storage(), offset, tensor.size(), tensor.stride())


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

    def copied(self, memo: Memo) -> WeightLayout:
        """A layout for the same weight with memory of its own, whose values are undefined until `set`."""
        ...

    def take_over(self, other: Any) -> None:
        """Take over the weight of a layout that `copied` made, without another conversion and at the same addresses:
        structs and recorded graphs stay valid."""
        ...

    def tensors(self) -> Sequence[torch.Tensor]:
        """The memory that `set` writes in place; none where it makes a new object."""
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


Across = Callable[[torch.Tensor], torch.Tensor]
"""Maximum over all ranks of each value"""
Quantize = Callable[[torch.Tensor, torch.dtype, Across | None], WeightLayout]
"""(weight (out, in), compute dtype, for a weight of which each rank has some inputs: maximum over the ranks) ->
quantized layout"""
