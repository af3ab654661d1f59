"""Weights of 8 or 4 bits, as a form of the linear layer.

Every scheme here is one rule: value = table[code] * scale - offset, with a scale (and where a scheme is asymmetric, an
offset) for each output and group of inputs. The table is what makes a scheme: whole numbers (int8, GPTQ, AWQ), the
quantiles of a normal distribution (nf4), or small floats (fp8). Products with tables of whole numbers are as exact as
the activations are; none of these forms quantises activations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

_SLICE_BYTES = 32 << 20
"""Of a weight that torch multiplies with, how much is dequantised at once."""
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


class QuantisedWeight:
    """A weight (out, in). Made by the functions below."""

    def __init__(
        self,
        scheme: Scheme,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        dtype: torch.dtype,
        input_order: torch.Tensor | None,
    ) -> None:
        """`codes` (out, in) uint8; `scales` and `offsets` (out, groups) float32; `input_order` (in,) int64."""
        self._scheme = scheme
        self._codes = codes
        self._scales = scales
        self._offsets = offsets
        self._dtype = dtype
        self._order = input_order

    @property
    def nbytes(self) -> int:
        tensors = (self._codes, self._scales, self._offsets, self._order)
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor is not None)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._order is not None:
            x = x[..., self._order]
        out, width = self._codes.shape
        step = max(1, _SLICE_BYTES // (width * self._dtype.itemsize))
        parts = [F.linear(x, self._values(slice(at, at + step)).to(self._dtype)) for at in range(0, out, step)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if bias is None else y + bias

    def get(self) -> torch.Tensor:
        """Dequantised, in the compute dtype."""
        values = self._values(slice(None)).to(self._dtype)
        if self._order is None:
            return values
        weight = torch.empty_like(values)
        weight[:, self._order] = values
        return weight

    def set(self, weight: torch.Tensor) -> None:
        """Quantised anew, by the same scheme with scales of its own."""
        weight = weight.to(self._codes.device)
        ordered = weight if self._order is None else weight[:, self._order]
        codes, scales, offsets = _quantise(ordered, self._scheme)
        self._codes.copy_(codes)
        self._scales.copy_(scales)
        if self._offsets is not None and offsets is not None:
            self._offsets.copy_(offsets)

    def part(self, rows: slice) -> QuantisedWeight:
        offsets = None if self._offsets is None else self._offsets[rows]
        return QuantisedWeight(self._scheme, self._codes[rows], self._scales[rows], offsets, self._dtype, self._order)

    def _values(self, rows: slice) -> torch.Tensor:
        table = torch.tensor(self._scheme.table, device=self._codes.device)
        values = table[self._codes[rows].int()]
        width, group = self._codes.shape[1], self._scheme.group
        values *= self._scales[rows].repeat_interleave(group, dim=1)[:, :width]
        if self._offsets is not None:
            values -= self._offsets[rows].repeat_interleave(group, dim=1)[:, :width]
        return values


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

    `codes` (out, in), uint8 or int8; `scales`, `zeros` (out, groups), zeros not necessarily whole numbers. `bits`, 8 or 4,
    is how codes are kept: those of 2 or 3 bits fit in 4. `group` is how many inputs share a scale, by default in / groups;
    the last group may be shorter. `dtype` is what is computed in. With `input_order` (in,), column j of `codes` belongs
    to input `input_order[j]` (GPTQ's order of activations). Raises ValueError for shapes and codes that do not fit."""
    out, width = codes.shape
    group = group or -(-width // scales.shape[1])
    if scales.shape != (out, -(-width // group)) or (zeros is not None and zeros.shape != scales.shape):
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} in groups of {group} need scales and zeros of shape "
            f"{(out, -(-width // group))}, not {tuple(scales.shape)}"
            + ("" if zeros is None else f" and {tuple(zeros.shape)}")
        )
    scales, zeros = scales.float(), None if zeros is None else zeros.float()
    if table is not None:
        if bits != 4 or len(table) != 16 or zeros is not None:
            raise ValueError("a table has 16 entries, for codes of 4 bits without zeros")
        scheme, offsets = Scheme(4, tuple(float(value) for value in table), group, False), None
        codes = codes.to(torch.uint8)
    else:
        codes, zeros, values = _whole_numbers(codes.to(torch.int16), zeros, bits)
        scheme = Scheme(bits, values, group, zeros is not None)
        offsets = None if zeros is None else zeros * scales
    return QuantisedWeight(scheme, codes, scales, offsets, dtype, input_order)


def quantise_int8(weight: torch.Tensor, dtype: torch.dtype) -> QuantisedWeight:
    """`weight` (out, in) in 8 bits, symmetrically, with a scale for each output."""
    return _quantised(weight, Scheme(8, _WHOLE, weight.shape[1], False), dtype)


def quantise_nf4(weight: torch.Tensor, dtype: torch.dtype, group: int = 64) -> QuantisedWeight:
    """`weight` (out, in) in 4 bits of NormalFloat, with a scale for each `group` inputs of an output."""
    return _quantised(weight, Scheme(4, NF4, group, False), dtype)


def _quantised(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantisedWeight:
    return QuantisedWeight(scheme, *_quantise(weight, scheme), dtype, None)


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
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[float, ...]]:
    """Codes whose value is code - zero, as codes of a table. A zero that all groups share goes into the table, and
    products need not care for it."""
    lowest, highest = (int(edge) for edge in codes.aminmax())
    if highest - lowest >= 1 << bits:
        raise ValueError(f"codes from {lowest} to {highest} do not fit {bits} bits")
    shared = 0.0 if zeros is None else float(zeros.flatten()[0])
    is_shared = shared.is_integer() and (zeros is None or bool((zeros == shared).all()))
    if bits == 4:
        shift = 8 if lowest < 0 else 0  # signed codes
        if lowest + shift < 0 or highest + shift > 15:
            raise ValueError(f"codes from {lowest} to {highest} do not fit 4 bits")
        codes = (codes + shift).to(torch.uint8)
        if is_shared and 0 < shared + shift < 15:
            return codes, None, tuple(value - shared - shift for value in range(16))
        zeros = torch.zeros(1, device=codes.device) if zeros is None else zeros
        return codes, zeros + shift, tuple(float(value) for value in range(16))
    if is_shared and lowest - shared >= -127 and highest - shared <= 127:
        codes = codes - int(shared)
        return torch.where(codes < 0, 128 - codes, codes).to(torch.uint8), None, _WHOLE
    shift = 0 if lowest < 0 else 128
    codes = codes - shift
    if zeros is None:
        zeros = torch.zeros(1, device=codes.device)
    return torch.where(codes < 0, 127 - codes, codes).to(torch.uint8), zeros - shift + 0.5, _HALVES


def _quantise(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`weight` (out, in) -> codes (out, in), scales and offsets (out, groups): each value becomes the nearest of the
    table's, scaled so that the largest of a group (both the smallest and the largest, with offsets) is the last."""
    out, width = weight.shape
    groups = -(-width // scheme.group)
    values = F.pad(weight.float(), (0, groups * scheme.group - width)).view(out, groups, scheme.group)
    order, table = _sorted_table(scheme.table, weight.device)
    low, high = float(table[0]), float(table[-1])
    offsets = None
    if scheme.has_offsets:
        smallest, largest = values.amin(-1), values.amax(-1)
        scales = (largest - smallest) / (high - low)
        offsets = low * scales - smallest
        values = values + offsets.unsqueeze(-1)
    else:
        scales = values.abs().amax(-1) / min(high, -low)
    divisors = torch.where(scales == 0, torch.ones_like(scales), scales)
    middles = (table[1:] + table[:-1]) / 2
    codes = order[torch.bucketize(values / divisors.unsqueeze(-1), middles)]
    return codes.view(out, -1)[:, :width].contiguous(), scales, offsets


def _sorted_table(table: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes by rising value, these values), each value once."""
    first = {value: code for code, value in reversed(list(enumerate(table)))}
    values = sorted(first)
    codes = torch.tensor([first[value] for value in values], dtype=torch.uint8, device=device)
    return codes, torch.tensor(values, device=device)
