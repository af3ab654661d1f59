"""The one linear layer class, and the forms in which it keeps its weight.

On a CPU, products are two to three times as fast with a weight in an order of its own (see docs/performance.md). The
plain form is dropped, not kept beside. A new form (sharded, quantised) is one more class with these methods.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from fastserve.engine.kernels.packed_linear import LANES, PackedLinearKernel, WeightStruct


class WeightForm(Protocol):
    """How a weight of shape (out, in) is kept."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` (..., in) -> (..., out)"""
        ...

    def get(self) -> torch.Tensor:
        """The weight as a plain tensor (out, in)."""
        ...

    def set(self, weight: torch.Tensor) -> None:
        """Replace it by `weight` (out, in)."""
        ...

    def part(self, rows: slice) -> WeightForm:
        """Some outputs of it, as a form that shares its memory."""
        ...

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        """What kernels for CPUs are told of it, None where they cannot multiply with it. It points to memory that stays
        in its place as long as this object and `bias` live, also when the weight is set."""
        ...


@runtime_checkable
class RowForm(WeightForm, Protocol):
    """A form that an embedding tied to the layer can share."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` (...) of outputs -> their weights (..., in)"""
        ...


class PlainWeight:
    """As the checkpoint has it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self._weight, bias)

    def get(self) -> torch.Tensor:
        return self._weight

    def set(self, weight: torch.Tensor) -> None:
        self._weight.copy_(weight)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self._weight)

    def part(self, rows: slice) -> WeightForm:
        return PlainWeight(self._weight[rows])

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        return None


class GroupedWeight:
    """In groups of 16 outputs, for our own kernel (CPU with a compiler)."""

    def __init__(self, packed: torch.Tensor, out: int, width: int, kernel: PackedLinearKernel) -> None:
        self._packed = packed
        self._shape = (out, width)
        self._kernel = kernel

    @classmethod
    def of(cls, weight: torch.Tensor) -> GroupedWeight | None:
        """None where the kernel cannot multiply with it."""
        kernel = PackedLinearKernel.load(weight.dtype)
        if kernel is None or not kernel.supports(weight):
            return None
        out, width = weight.shape
        return cls(kernel.pack(weight), out, width, kernel)

    @classmethod
    def joint(cls, weights: Sequence[torch.Tensor]) -> GroupedWeight | None:
        """One above the other, without a copy that has them so in plain order."""
        first = weights[0]
        kernel = PackedLinearKernel.load(first.dtype)
        if kernel is None or not kernel.supports(first) or any(weight.shape[0] % LANES for weight in weights):
            return None
        out, width = sum(weight.shape[0] for weight in weights), first.shape[1]
        whole = cls(kernel.empty(out, width, first.dtype), out, width, kernel)
        for part, weight in zip(_parts(whole, weights), weights, strict=True):
            part.set(weight)
        return whole

    def struct(self, bias: torch.Tensor | None) -> WeightStruct:
        return WeightStruct(self._packed.data_ptr(), None if bias is None else bias.data_ptr(), *self._shape)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._kernel.product(x, self.struct(bias), self._shape[0])

    def get(self) -> torch.Tensor:
        return self._kernel.unpack(self._packed, *self._shape)

    def set(self, weight: torch.Tensor) -> None:
        self._kernel.pack(weight.to(self._packed.dtype), self._packed)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self._kernel.rows(ids, self.struct(None), self._shape[1], self._packed.dtype)

    def part(self, rows: slice) -> WeightForm:
        if rows.start % LANES or (rows.stop % LANES and rows.stop != self._shape[0]):
            return RowsOfWeight(self, rows)
        width = self._shape[1]
        stop = -(-rows.stop // LANES) * LANES
        return GroupedWeight(
            self._packed[rows.start * width : stop * width], rows.stop - rows.start, width, self._kernel
        )


class OneDnnWeight:
    """Reordered for oneDNN: for CPUs without a compiler, and for those with matrix units (AMX), which it knows."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._dtype = weight.dtype
        self.set(weight)

    @classmethod
    def of(cls, weight: torch.Tensor) -> OneDnnWeight | None:
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return None
        can = {
            torch.float32: lambda: True,
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
        return cls(weight) if weight.dtype in can and can[weight.dtype]() else None

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return out

    def get(self) -> torch.Tensor:
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def set(self, weight: torch.Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self._dtype).contiguous(), None)

    def part(self, rows: slice) -> WeightForm:
        return RowsOfWeight(self, rows)

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        return None


class RowsOfWeight:
    """Some rows of a weight that can only be taken apart as a whole."""

    def __init__(self, whole: WeightForm, rows: slice) -> None:
        self._whole = whole
        self._rows = rows

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.get(), bias)

    def get(self) -> torch.Tensor:
        return self._whole.get()[self._rows]

    def set(self, weight: torch.Tensor) -> None:
        whole = self._whole.get().clone()
        whole[self._rows] = weight
        self._whole.set(whole)

    def part(self, rows: slice) -> WeightForm:
        return RowsOfWeight(self._whole, slice(self._rows.start + rows.start, self._rows.start + rows.stop))

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        return None


def is_mapped(weight: torch.Tensor) -> bool:
    """Whether it lies in a file: then its order is not changed, since that would bring it into memory."""
    return weight.device.type == "cpu" and weight.untyped_storage().filename is not None


def form_of(weight: torch.Tensor) -> WeightForm:
    """The fastest form that this weight can have."""
    if is_mapped(weight):
        return PlainWeight(weight)
    orders = (OneDnnWeight, GroupedWeight) if _has_matrix_unit(weight.dtype) else (GroupedWeight, OneDnnWeight)
    return orders[0].of(weight) or orders[1].of(weight) or PlainWeight(weight)


@functools.cache
def _has_matrix_unit(dtype: torch.dtype) -> bool:
    if dtype is not torch.bfloat16:
        return False
    has_amx: bool = torch.cpu._is_amx_tile_supported()
    return has_amx


def joint_form(weights: Sequence[torch.Tensor]) -> tuple[WeightForm, list[WeightForm]]:
    """One weight for layers that take the same input, and each layer's own as a part of it."""
    whole: WeightForm | None = None
    if not _has_matrix_unit(weights[0].dtype) and not any(is_mapped(weight) for weight in weights):
        whole = GroupedWeight.joint(weights)
    if whole is None:
        whole = form_of(torch.cat(list(weights)))
    return whole, _parts(whole, weights)


def _parts(whole: WeightForm, weights: Sequence[torch.Tensor]) -> list[WeightForm]:
    ends = itertools.accumulate(weight.shape[0] for weight in weights)
    return [whole.part(slice(begin, end)) for begin, end in itertools.pairwise([0, *ends])]


class Linear(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """y = x W^T + b, and what adapters add to it."""

    def __init__(self, weight: WeightForm, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.form = weight
        self.bias = bias
        self.delta: Callable[[torch.Tensor], torch.Tensor] | None = None
        """For `x` (..., in) of a packed batch, what the adapters of its sequences add: (..., out)."""

    @property
    def weight(self) -> torch.Tensor:
        """A plain tensor (out, in), for model code that looks at it; made anew when the weight is packed."""
        return self.form.get()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.form.product(x, self.bias)
        return out if self.delta is None else out + self.delta(x)


class TiedEmbedding(torch.nn.Module):  # type: ignore[misc]
    """An embedding whose rows are the weights of a linear layer, which are kept once."""

    def __init__(self, form: RowForm, like: torch.nn.Embedding) -> None:
        super().__init__()
        self.form = form
        self.embedding_dim = like.embedding_dim
        self.scalar_embed_scale = embedding_scale(like)

    @property
    def weight(self) -> torch.Tensor:
        """A plain tensor (vocabulary, hidden), for model code that looks at it; made anew when the weight is packed."""
        return self.form.get()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.form.rows(ids)
        scale = self.scalar_embed_scale
        return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype)


def embedding_scale(embedding: torch.nn.Module) -> float:
    """What an embedding's rows are multiplied with: 1, but in Gemma's models."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def can_be_tied(module: torch.nn.Module) -> bool:
    """Whether a TiedEmbedding can take its place: other subclasses may compute something else."""
    return type(module) is torch.nn.Embedding or hasattr(module, "scalar_embed_scale")
