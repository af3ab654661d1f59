"""A weight packed for our CPU kernel."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from fastserve.engine.kernels.packed_linear import LANES, PackedLinearKernel, WeightStruct
from fastserve.engine.layers.layouts.layout import Memo, WeightLayout, memory_like
from fastserve.engine.layers.layouts.rows import RowsOfWeight


class GroupedWeight:
    """Packed in groups of 16 outputs, for our own kernel (CPU with a compiler)."""

    def __init__(self, packed: torch.Tensor, out: int, width: int, kernel: PackedLinearKernel) -> None:
        self._packed = packed
        self._shape = (out, width)
        self._kernel = kernel

    @classmethod
    def of(cls, weight: torch.Tensor) -> GroupedWeight | None:
        """None if the kernel does not support the weight."""
        kernel = PackedLinearKernel.load(weight.dtype)
        if kernel is None or not kernel.supports(weight):
            return None
        out, width = weight.shape
        return cls(kernel.pack(weight), out, width, kernel)

    @classmethod
    def joint(cls, weights: Sequence[torch.Tensor]) -> GroupedWeight | None:
        """The weights concatenated along their outputs, packed without a plain concatenated copy. None if
        unsupported."""
        first = weights[0]
        kernel = PackedLinearKernel.load(first.dtype)
        if kernel is None or not kernel.supports(first) or any(weight.shape[0] % LANES for weight in weights):
            return None
        out, width = sum(weight.shape[0] for weight in weights), first.shape[1]
        whole = cls(kernel.empty(out, width, first.dtype), out, width, kernel)
        for part, weight in zip(split_rows(whole, weights), weights, strict=True):
            part.set(weight)
        return whole

    def struct(self, bias: torch.Tensor | None) -> WeightStruct:
        return WeightStruct(self._packed.data_ptr(), None if bias is None else bias.data_ptr(), *self._shape)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._kernel.product(x, self.struct(bias), self._shape[0])

    def partial_product(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernel.product(x, self.struct(None), self._shape[0], in_float32=True)

    def get(self) -> torch.Tensor:
        return self._kernel.unpack(self._packed, *self._shape)

    def set(self, weight: torch.Tensor) -> None:
        self._kernel.pack(weight.to(self._packed.dtype), self._packed)

    def copied(self, memo: Memo) -> GroupedWeight:
        return GroupedWeight(memory_like(self._packed, memo), *self._shape, self._kernel)

    def take_over(self, other: GroupedWeight) -> None:
        self._packed.copy_(other._packed)

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self._packed,)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self._kernel.rows(ids, self.struct(None), self._shape[1], self._packed.dtype)

    def part(self, rows: slice) -> WeightLayout:
        if rows.start % LANES or (rows.stop % LANES and rows.stop != self._shape[0]):
            return RowsOfWeight(self, rows)
        width = self._shape[1]
        stop = -(-rows.stop // LANES) * LANES
        return GroupedWeight(
            self._packed[rows.start * width : stop * width], rows.stop - rows.start, width, self._kernel
        )


def split_rows(whole: WeightLayout, weights: Sequence[torch.Tensor]) -> list[WeightLayout]:
    """Split the layout of concatenated weights into the part of each of them."""
    ends = itertools.accumulate(weight.shape[0] for weight in weights)
    return [whole.part(slice(begin, end)) for begin, end in itertools.pairwise([0, *ends])]
