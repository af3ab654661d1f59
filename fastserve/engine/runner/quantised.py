"""Weights of 8 or 4 bits, as a form of the linear layer.

Every scheme here is one rule: value = table[code] * scale - offset, with a scale (and where a scheme is asymmetric, an
offset) for each output and group of inputs. The table is what makes a scheme: whole numbers (int8, GPTQ, AWQ), the
quantiles of a normal distribution (nf4), or small floats (fp8). Products with tables of whole numbers are as exact as
the activations are; none of these forms quantises activations.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from fastserve.engine.kernels.packed_linear import UNIT, PackedLinearKernel, WeightStruct
from fastserve.engine.kernels.stored_codes import CodesKernel, StoredCodes, find_codes_kernel
from fastserve.engine.runner.linear import RowsOfWeight, WeightForm

_DEQUANTISED = 1 << 22
"""How many entries of a weight torch dequantises at once."""
_QUANTISED = 1 << 18
"""How many are quantised at once: they stay in the caches of a CPU for all passes over them."""
_Parts: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""codes (out, in) uint8, a byte each; scales and offsets (out, groups) float32"""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat of 4 bits (Dettmers et al., QLoRA, 2023, appendix E)."""


@dataclass(frozen=True, slots=True)
class Scheme:
    bits: int
    """8 or 4"""
    table: tuple[float, ...]
    """What a code stands for: 16 entries, or 256 of which the second half is the first with its sign turned."""
    group: int
    """Neighbouring inputs that share a scale; the last group of an output may be shorter."""
    has_offsets: bool


class _Plain:
    """Codes in their own order, for torch operations on any device; those of 4 bits in pairs."""

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

    def read(self, rows: slice | torch.Tensor) -> _Parts:
        codes = self._codes[rows]
        if self._bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, : self._width]
        return codes, self._scales[rows], None if self._offsets is None else self._offsets[rows]

    def write(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> None:
        new = _Plain(self._bits, codes, scales, offsets)
        for old, value in zip(self.tensors(), new.tensors(), strict=True):
            old.copy_(value)

    def part(self, rows: slice) -> _Plain:
        part = copy.copy(self)
        part._codes, part._scales = self._codes[rows], self._scales[rows]
        part._offsets = None if self._offsets is None else self._offsets[rows]
        return part

    def stored(self, scheme: Scheme, table: torch.Tensor, order: torch.Tensor | None) -> StoredCodes:
        positive = scheme.table[: 1 << scheme.bits - (scheme.bits == 8)]
        counts = all(after - before == 1.0 for before, after in itertools.pairwise(positive))
        return StoredCodes(
            self._codes, self._scales, self._offsets, table, positive[0], counts, order, self._width, scheme.bits,
            scheme.group,
        )  # fmt: skip


class _Blocks:
    """In the order of our kernel for CPUs: units of 64 outputs, scales and offsets (out / 64, groups, 64)."""

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
    def of(cls, scheme: Scheme, parts: _Parts, dtype: torch.dtype) -> _Blocks | None:
        """None where the kernel cannot multiply with it."""
        codes = parts[0]
        step = 32 // scheme.bits
        if codes.device.type != "cpu" or codes.shape[1] % step or scheme.group % step:
            return None
        kernel = PackedLinearKernel.load(dtype, for_codes=True)
        return None if kernel is None else cls(scheme.bits, *parts, kernel)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (tensor for tensor in (self._packed, self._scales, self._offsets) if tensor is not None)

    def read(self, rows: slice) -> _Parts:
        begin, stop, _ = rows.indices(self.shape[0])
        first = begin // UNIT * UNIT
        some = self.part(slice(first, min(self.shape[0], -(-stop // UNIT) * UNIT)))
        codes = some.kernel.unpack_codes(some._packed, *some.shape, some._bits)
        here = slice(begin - first, stop - first)
        offsets = None if some._offsets is None else _by_rows(some._offsets)[here]
        return codes[here], _by_rows(some._scales)[here], offsets

    def write(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> None:
        new = _Blocks(self._bits, codes, scales, offsets, self.kernel)
        for old, value in zip(self.tensors(), new.tensors(), strict=True):
            old.copy_(value)

    def part(self, rows: slice) -> _Blocks:
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


class QuantisedWeight:
    """A weight (out, in), as a form of the linear layer. Made by the functions below."""

    def __init__(
        self, scheme: Scheme, parts: _Parts, dtype: torch.dtype, input_order: torch.Tensor | None = None
    ) -> None:
        self._scheme = scheme
        self._dtype = dtype
        self._store: _Plain | _Blocks = _Blocks.of(scheme, parts, dtype) or _Plain(scheme.bits, *parts)
        self._order = None if input_order is None else input_order.to(self._store.device, torch.int32)
        self._table = torch.tensor(scheme.table, device=self._store.device)
        self._gpu_kernel: CodesKernel | None = find_codes_kernel(self._store.device)

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.itemsize for tensor in self._store.tensors())

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        struct = self.struct(bias)
        if struct is not None and isinstance(self._store, _Blocks) and x.dtype == self._dtype:
            return self._store.kernel.product(x, struct, self._store.shape[0])
        if (found := self._product_on_gpu(x)) is not None:
            return found if bias is None else found + bias
        if self._order is not None:
            x = x[..., self._order]
        parts = [
            F.linear(x, self._values(self._store.read(rows)), None if bias is None else bias[rows])
            for rows in _slices(self._store.shape, _DEQUANTISED)
        ]
        return torch.cat(parts, dim=-1)

    def _product_on_gpu(self, x: torch.Tensor) -> torch.Tensor | None:
        kernel, rows = self._gpu_kernel, x.numel() // x.shape[-1]
        if kernel is None or isinstance(self._store, _Blocks) or rows > kernel.most_rows or x.dtype != self._dtype:
            return None
        weight = self._store.stored(self._scheme, self._table, self._order)
        if not kernel.supports(weight):
            return None
        return kernel.product(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)

    def get(self) -> torch.Tensor:
        """Dequantised, in the compute dtype."""
        weight = torch.empty(self._store.shape, dtype=self._dtype, device=self._store.device)
        columns = slice(None) if self._order is None else self._order
        for rows in _slices(self._store.shape, _DEQUANTISED):
            weight[rows, columns] = self._values(self._store.read(rows))
        return weight

    def set(self, weight: torch.Tensor) -> None:
        """Quantised anew, by the same scheme with scales of its own."""
        ordered = (
            weight.to(self._store.device) if self._order is None else weight.to(self._store.device)[:, self._order]
        )
        self._store.write(*_quantise(ordered, self._scheme))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(self._store, _Blocks):
            struct = self._store.struct(None, self._scheme.group, self._table, self._order)
            return self._store.kernel.rows(ids, struct, self._store.shape[1], self._dtype)
        values = self._values(self._store.read(ids.flatten()))
        rows = torch.empty_like(values)
        rows[:, slice(None) if self._order is None else self._order] = values
        return rows.view(*ids.shape, -1)

    def part(self, rows: slice) -> WeightForm:
        begin, stop, _ = rows.indices(self._store.shape[0])
        if isinstance(self._store, _Blocks) and (begin % UNIT or (stop % UNIT and stop != self._store.shape[0])):
            first = begin // UNIT * UNIT
            around = self.part(slice(first, min(self._store.shape[0], -(-stop // UNIT) * UNIT)))
            return RowsOfWeight(around, slice(begin - first, stop - first))
        part = copy.copy(self)
        part._store = self._store.part(rows)
        return part

    def struct(self, bias: torch.Tensor | None) -> WeightStruct | None:
        if isinstance(self._store, _Plain):
            return None
        return self._store.struct(bias, self._scheme.group, self._table, self._order)

    def _values(self, parts: _Parts) -> torch.Tensor:
        """In the order of the columns of codes."""
        codes, scales, offsets = parts
        width, group = codes.shape[1], self._scheme.group
        values = self._table[codes.int()]
        values *= scales.repeat_interleave(group, dim=1)[:, :width]
        if offsets is not None:
            values -= offsets.repeat_interleave(group, dim=1)[:, :width]
        return values.to(self._dtype)


def from_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    bits: int,
    dtype: torch.dtype,
    table: Sequence[float] | None = None,
    input_order: torch.Tensor | None = None,
    group: int | None = None,
) -> QuantisedWeight:
    """A weight of a checkpoint: value = (code - zero) * scale, or table[code] * scale.

    `codes` (out, in), uint8 or int8; `scales`, `zeros` (out, groups); zeros need not be whole numbers. `bits`, 8 or 4,
    is how codes are kept: those of 2 or 3 bits fit in 4. `group` is how many inputs share a scale, by default
    in / groups; the last group may be shorter. `dtype` is what is computed in. With `input_order` (in,), column j of
    `codes` belongs to input `input_order[j]` (GPTQ's order of activations). Raises ValueError for shapes and codes that
    do not fit."""
    out, width = codes.shape
    group = group or -(-width // scales.shape[1])
    expected = (out, -(-width // group))
    if scales.shape != expected or (zeros is not None and zeros.shape != expected):
        found = [tuple(tensor.shape) for tensor in (scales, zeros) if tensor is not None]
        raise ValueError(
            f"codes of shape {(out, width)} in groups of {group} need scales (and zeros) of shape {expected}, not "
            + " and ".join(map(str, found))
        )
    if input_order is not None and not torch.equal(input_order.long().sort().values.cpu(), torch.arange(width)):
        raise ValueError(f"the order of inputs must name each of 0 to {width - 1} once")
    if table is not None and (bits != 4 or len(table) != 16 or zeros is not None):
        raise ValueError("a table has 16 entries, for codes of 4 bits without zeros")
    scales, zeros = scales.float(), None if zeros is None else zeros.float()
    if table is None:
        codes, zeros, table = _whole_numbers(codes.to(torch.int16), zeros, bits)
    scheme = Scheme(bits, tuple(table), group, has_offsets=zeros is not None)
    parts = (codes.to(torch.uint8), scales, None if zeros is None else (zeros * scales).expand_as(scales))
    return QuantisedWeight(scheme, parts, dtype, input_order)


def from_float8(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> QuantisedWeight:
    """`weight` (out, in) of float8_e4m3fn or float8_e5m2, `scales` (out, groups): value = weight * scale."""
    magnitudes = torch.arange(128, dtype=torch.uint8).view(weight.dtype).tolist()
    group = -(-weight.shape[1] // scales.shape[1])
    scheme = Scheme(8, _signed(magnitudes), group, has_offsets=False)
    return QuantisedWeight(scheme, (weight.view(torch.uint8), scales.float(), None), dtype)


def quantise_int8(weight: torch.Tensor, dtype: torch.dtype) -> QuantisedWeight:
    """`weight` (out, in) in 8 bits, symmetrically, with a scale for each output."""
    return _quantised(weight, Scheme(8, _WHOLE, weight.shape[1], has_offsets=False), dtype)


def quantise_nf4(weight: torch.Tensor, dtype: torch.dtype, group: int = 64) -> QuantisedWeight:
    """`weight` (out, in) in 4 bits of NormalFloat, with a scale for each `group` inputs of an output."""
    return _quantised(weight, Scheme(4, NF4, group, has_offsets=False), dtype)


def _quantised(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantisedWeight:
    return QuantisedWeight(scheme, _quantise(weight, scheme), dtype)


# ---- codes ------------------------------------------------------------------------------------------------------


def _signed(magnitudes: Sequence[float]) -> tuple[float, ...]:
    """A table of 8 bits: a bit of sign, and 7 bits that choose one of 128 magnitudes."""
    return (*magnitudes, *(-value for value in magnitudes))


_WHOLE = _signed([float(value) for value in range(128)])
"""-127 to 127."""
_HALVES = _signed([value + 0.5 for value in range(128)])
"""-127.5 to 127.5 in steps of 1: 256 values, all exact in bfloat16, for schemes with offsets."""


def _whole_numbers(
    codes: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor | None, Sequence[float]]:
    """Codes whose value is code - zero -> codes, zeros and the table that they are codes of. A zero that all groups
    share goes into the table where that leaves values of both signs, and products need not care for it."""
    lowest, highest = (int(edge) for edge in codes.aminmax())
    shift = (1 << bits - 1) if lowest < 0 else 0  # signed codes
    if lowest + shift < 0 or highest + shift >= 1 << bits:
        raise ValueError(f"codes from {lowest} to {highest} do not fit {bits} bits")
    zeros = torch.zeros(1, device=codes.device) if zeros is None else zeros
    codes, zeros = codes + shift, zeros + shift
    shared = float(zeros.flatten()[0])
    is_shared = shared.is_integer() and bool((zeros == shared).all())
    if bits == 4:
        if is_shared and 0 < shared < 15:
            return codes, None, [value - shared for value in range(16)]
        return codes, zeros, [float(value) for value in range(16)]
    if is_shared and lowest + shift - shared >= -127 and highest + shift - shared <= 127:
        codes = codes - int(shared)
        return torch.where(codes < 0, 128 - codes, codes), None, _WHOLE
    # Code 0 stands for -127.5, code 255 for 127.5.
    return torch.where(codes < 128, 255 - codes, codes - 128), zeros - 127.5, _HALVES


def _quantise(weight: torch.Tensor, scheme: Scheme) -> _Parts:
    """Each value becomes the nearest of the table's, scaled so that the largest of a group (with offsets: both the
    smallest and the largest) is at the table's end."""
    order, table = _sorted_table(scheme.table, weight.device)
    found = [_quantise_rows(weight[rows].float(), scheme, order, table) for rows in _slices(weight.shape, _QUANTISED)]
    codes, scales, offsets = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(scales), torch.cat(offsets) if scheme.has_offsets else None


def _quantise_rows(weight: torch.Tensor, scheme: Scheme, order: torch.Tensor, table: torch.Tensor) -> _Parts:
    out, width = weight.shape
    groups = -(-width // scheme.group)
    # A last group that is short is filled up with what it has.
    filled = torch.cat((weight, weight[:, -1:].expand(-1, groups * scheme.group - width)), dim=1)
    values = filled.view(out, groups, scheme.group)
    low, high = float(table[0]), float(table[-1])
    offsets = None
    if scheme.has_offsets:
        smallest, largest = values.amin(-1), values.amax(-1)
        scales = (largest - smallest) / (high - low)
        offsets = low * scales - smallest
        values = values + offsets.unsqueeze(-1)
    else:
        scales = values.abs().amax(-1) / min(high, -low)
    divisors = torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    codes = order[_nearest(values / divisors, table).int()]
    return codes.view(out, -1)[:, :width], scales, offsets


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """For each value, where in the sorted table the nearest one is."""
    step = table[1] - table[0]
    if (table.diff() == step).all():
        return ((values - table[0]) / step).round_().clamp_(0, len(table) - 1)
    # A pass for each entry is faster than a search for each value, where vectors are long.
    found = torch.zeros_like(values, dtype=torch.uint8)
    for middle in ((table[1:] + table[:-1]) / 2).tolist():
        found += values > middle
    return found


def _sorted_table(table: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes by rising value, these values): finite ones, each once."""
    first = {value: code for code, value in reversed(list(enumerate(table))) if math.isfinite(value)}
    values = sorted(first)
    codes = torch.tensor([first[value] for value in values], dtype=torch.uint8, device=device)
    return codes, torch.tensor(values, device=device)


# ---- layout -----------------------------------------------------------------------------------------------------


def _slices(shape: Sequence[int], entries: int) -> Iterator[slice]:
    """Rows of about so many entries, beginning with a unit."""
    step = max(UNIT, entries // shape[1] // UNIT * UNIT)
    yield from (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))


def _in_pairs(codes: torch.Tensor) -> torch.Tensor:
    """(out, in) of 4 bits -> (out, in / 2), two in a byte."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def _by_units(scales: torch.Tensor) -> torch.Tensor:
    """(out, groups) -> (out / 64, groups, 64), filled up with zeros"""
    filled = F.pad(scales.float(), (0, 0, 0, -scales.shape[0] % UNIT))
    return filled.view(-1, UNIT, scales.shape[1]).transpose(1, 2).contiguous()


def _by_rows(scales: torch.Tensor) -> torch.Tensor:
    return scales.transpose(1, 2).flatten(0, 1)
