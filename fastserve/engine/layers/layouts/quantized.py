"""An 8-bit or 4-bit weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastserve.engine.devices.find import device_of
from fastserve.engine.kernels.packed_linear import UNIT, WeightStruct
from fastserve.engine.kernels.quantized_matmul import QuantizedMatmul
from fastserve.engine.layers.layouts.layout import Across, Memo, WeightLayout
from fastserve.engine.layers.layouts.quantization_scheme import QuantizedParts, Scheme, quantize, row_slices
from fastserve.engine.layers.layouts.quantized_storage import PackedStorage, PlainStorage
from fastserve.engine.layers.layouts.rows import RowsOfWeight

_DEQUANTIZED_ENTRIES = 1 << 22
"""Entries of a weight that torch dequantizes at once."""


class QuantizedWeight:
    """Layout of a quantized weight (out, in). Created by the functions of layers/quantization.py."""

    def __init__(
        self,
        scheme: Scheme,
        parts: QuantizedParts,
        dtype: torch.dtype,
        input_order: torch.Tensor | None = None,
        across: Across | None = None,
    ) -> None:
        """`across`: as for `quantize`, for `set`."""
        self._scheme = scheme
        self._dtype = dtype
        self._across = across
        self._store: PlainStorage | PackedStorage = PackedStorage.of(scheme, parts, dtype) or PlainStorage(
            scheme.bits, *parts
        )
        self._order = None if input_order is None else input_order.to(self._store.device, torch.int32)
        self._table = torch.tensor(scheme.table, device=self._store.device)
        self._matmul: QuantizedMatmul | None = device_of(self._store.device).quantized_matmul()

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.itemsize for tensor in self._store.tensors())

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        struct = self.struct(bias)
        if struct is not None and isinstance(self._store, PackedStorage) and x.dtype == self._dtype:
            return self._store.kernel.product(x, struct, self._store.shape[0])
        if (found := self._product_of_codes(x)) is not None:
            return found if bias is None else found + bias
        if self._order is not None:
            x = x[..., self._order]
        parts = [
            F.linear(x, self._values(self._store.read(rows)), None if bias is None else bias[rows])
            for rows in row_slices(self._store.shape, _DEQUANTIZED_ENTRIES)
        ]
        return torch.cat(parts, dim=-1)

    def partial_product(self, x: torch.Tensor) -> torch.Tensor:
        struct = self.struct(None)
        if struct is not None and isinstance(self._store, PackedStorage) and x.dtype == self._dtype:
            return self._store.kernel.product(x, struct, self._store.shape[0], in_float32=True)
        return self.product(x, None)

    def _product_of_codes(self, x: torch.Tensor) -> torch.Tensor | None:
        kernel, rows = self._matmul, x.numel() // x.shape[-1]
        if kernel is None or isinstance(self._store, PackedStorage) or rows > kernel.max_rows or x.dtype != self._dtype:
            return None
        weight = self._store.as_matrix(self._scheme, self._table, self._order)
        if not kernel.supports(weight):
            return None
        return kernel.product(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)

    def get(self) -> torch.Tensor:
        """The dequantized weight (out, in) in the compute dtype."""
        weight = torch.empty(self._store.shape, dtype=self._dtype, device=self._store.device)
        columns = slice(None) if self._order is None else self._order
        for rows in row_slices(self._store.shape, _DEQUANTIZED_ENTRIES):
            weight[rows, columns] = self._values(self._store.read(rows))
        return weight

    def set(self, weight: torch.Tensor) -> None:
        """Quantize `weight` (out, in) by the same scheme, with new scales."""
        ordered = (
            weight.to(self._store.device) if self._order is None else weight.to(self._store.device)[:, self._order]
        )
        self._store.write(*quantize(ordered, self._scheme, self._across))

    def copied(self, memo: Memo) -> QuantizedWeight:
        return copy.deepcopy(self, memo)

    def take_over(self, other: QuantizedWeight) -> None:
        for old, new in zip(self._store.tensors(), other._store.tensors(), strict=True):
            old.copy_(new)

    def tensors(self) -> Sequence[torch.Tensor]:
        return tuple(self._store.tensors())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(self._store, PackedStorage):
            struct = self._store.struct(None, self._scheme.group, self._table, self._order)
            return self._store.kernel.rows(ids, struct, self._store.shape[1], self._dtype)
        values = self._values(self._store.read(ids.flatten()))
        rows = torch.empty_like(values)
        rows[:, slice(None) if self._order is None else self._order] = values
        return rows.view(*ids.shape, -1)

    def part(self, rows: slice) -> WeightLayout:
        begin, stop, _ = rows.indices(self._store.shape[0])
        if isinstance(self._store, PackedStorage) and (begin % UNIT or (stop % UNIT and stop != self._store.shape[0])):
            first = begin // UNIT * UNIT
            around = self.part(slice(first, min(self._store.shape[0], -(-stop // UNIT) * UNIT)))
            return RowsOfWeight(around, slice(begin - first, stop - first))
        part = copy.copy(self)
        part._store = self._store.part(rows)
        return part

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        if isinstance(self._store, PlainStorage):
            return None
        return self._store.struct(bias, self._scheme.group, self._table, self._order)

    def _values(self, parts: QuantizedParts) -> torch.Tensor:
        """Dequantized values, their columns in the order of the codes."""
        codes, scales, offsets = parts
        width, group = codes.shape[1], self._scheme.group
        values = self._table[codes.int()]
        values *= scales.repeat_interleave(group, dim=1)[:, :width]
        if offsets is not None:
            values -= offsets.repeat_interleave(group, dim=1)[:, :width]
        return values.to(self._dtype)
