"""Storage of the codes and scales of a quantized weight: in plain order, or packed for our CPU kernel."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastserve.engine.devices.find import device_of
from fastserve.engine.kernels.packed_linear import UNIT, PackedLinearKernel, WeightStruct
from fastserve.engine.kernels.quantized_matmul import QuantizedMatrix
from fastserve.engine.layers.layouts.quantization_scheme import QuantizedParts, Scheme


class PlainStorage:
    """Codes in plain order, for torch operations on any device; 4-bit codes two in a byte."""

    def __init__(self, bits: int, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> None:
        self._bits = bits
        self._codes = codes if bits == 8 else _in_pairs(codes)
        self._width = codes.shape[1]
        self._scales = scales.contiguous()
        self._offsets = None if offsets is None else offsets.contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        return self._codes.shape[0], self._width

    @property
    def device(self) -> torch.device:
        return self._codes.device

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (tensor for tensor in (self._codes, self._scales, self._offsets) if tensor is not None)

    def read(self, rows: slice | torch.Tensor) -> QuantizedParts:
        codes = self._codes[rows]
        if self._bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, : self._width]
        return codes, self._scales[rows], None if self._offsets is None else self._offsets[rows]

    def write(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> None:
        new = PlainStorage(self._bits, codes, scales, offsets)
        for old, value in zip(self.tensors(), new.tensors(), strict=True):
            old.copy_(value)

    def part(self, rows: slice) -> PlainStorage:
        part = copy.copy(self)
        part._codes, part._scales = self._codes[rows], self._scales[rows]
        part._offsets = None if self._offsets is None else self._offsets[rows]
        return part

    def as_matrix(self, scheme: Scheme, table: torch.Tensor, order: torch.Tensor | None) -> QuantizedMatrix:
        positive = scheme.table[: 1 << scheme.bits - (scheme.bits == 8)]
        is_integer = all(after - before == 1.0 for before, after in itertools.pairwise(positive))
        return QuantizedMatrix(
            self._codes, self._scales, self._offsets, table, positive[0], is_integer, order, self._width, scheme.bits,
            scheme.group,
        )  # fmt: skip


class PackedStorage:
    """Packed for our CPU kernel: units of 64 outputs, scales and offsets (out / 64, groups, 64)."""

    def __init__(
        self,
        bits: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        kernel: PackedLinearKernel,
    ) -> None:
        self._bits = bits
        self.shape = (int(codes.shape[0]), int(codes.shape[1]))
        self.kernel = kernel
        self._packed = kernel.pack_codes(codes, bits)
        self._scales = _by_units(scales)
        self._offsets = None if offsets is None else _by_units(offsets)

    device = torch.device("cpu")

    @classmethod
    def of(cls, scheme: Scheme, parts: QuantizedParts, dtype: torch.dtype) -> PackedStorage | None:
        """None if the kernel does not support the weight."""
        codes = parts[0]
        step = 32 // scheme.bits
        if not device_of(codes.device).packs_weights or codes.shape[1] % step or scheme.group % step:
            return None
        kernel = PackedLinearKernel.load(dtype, for_codes=True)
        return None if kernel is None else cls(scheme.bits, *parts, kernel)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (tensor for tensor in (self._packed, self._scales, self._offsets) if tensor is not None)

    def read(self, rows: slice) -> QuantizedParts:
        begin, stop, _ = rows.indices(self.shape[0])
        first = begin // UNIT * UNIT
        some = self.part(slice(first, min(self.shape[0], -(-stop // UNIT) * UNIT)))
        codes = some.kernel.unpack_codes(some._packed, *some.shape, some._bits)
        here = slice(begin - first, stop - first)
        offsets = None if some._offsets is None else _by_rows(some._offsets)[here]
        return codes[here], _by_rows(some._scales)[here], offsets

    def write(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> None:
        new = PackedStorage(self._bits, codes, scales, offsets, self.kernel)
        for old, value in zip(self.tensors(), new.tensors(), strict=True):
            old.copy_(value)

    def part(self, rows: slice) -> PackedStorage:
        """`rows` begin and end with a unit, or at the last output."""
        begin, stop, _ = rows.indices(self.shape[0])
        groups = slice(begin // UNIT, -(-stop // UNIT))
        part = copy.copy(self)
        part.shape = (stop - begin, self.shape[1])
        size = UNIT * self.shape[1] * self._bits // 8
        part._packed = self._packed[groups.start * size : groups.stop * size]
        part._scales = self._scales[groups]
        part._offsets = None if self._offsets is None else self._offsets[groups]
        return part

    def struct(
        self, bias: torch.Tensor | None, group: int, table: torch.Tensor, order: torch.Tensor | None
    ) -> WeightStruct:
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (self._offsets, table, order))
        return WeightStruct(
            self._packed.data_ptr(), None if bias is None else bias.data_ptr(), *self.shape,
            self._bits, min(group, self.shape[1]), self._scales.data_ptr(), *pointers,
        )  # fmt: skip


def _in_pairs(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes (out, in) -> (out, in / 2), two in a byte"""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def _by_units(scales: torch.Tensor) -> torch.Tensor:
    """(out, groups) -> (out / 64, groups, 64), padded with zeros"""
    filled = F.pad(scales.float(), (0, 0, 0, -scales.shape[0] % UNIT))
    return filled.view(-1, UNIT, scales.shape[1]).transpose(1, 2).contiguous()


def _by_rows(scales: torch.Tensor) -> torch.Tensor:
    return scales.transpose(1, 2).flatten(0, 1)
