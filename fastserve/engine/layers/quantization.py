"""Quantized weights from the codes of a checkpoint, or from dense weights (int8, nf4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastserve.engine.layers.layouts.layout import Across
from fastserve.engine.layers.layouts.quantization_scheme import Scheme, quantize, row_slices
from fastserve.engine.layers.layouts.quantized import QuantizedWeight

_CONVERTED_ENTRIES = 1 << 16
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""4-bit NormalFloat (Dettmers et al., QLoRA, 2023, appendix E)."""


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
) -> QuantizedWeight:
    """Layout of a quantized weight: value = (code - zero) * scale, or table[code] * scale.

    `codes` (out, in), uint8 or int8; `scales`, `zeros` (out, groups); zeros need not be integers. `bits`, 8 or 4: the
    storage width; codes of 2 or 3 bits are stored in 4. `group`: number of inputs that share a scale, by default
    in / groups; the last group may be shorter. `dtype`: the compute dtype. With `input_order` (in,), column j of
    `codes` belongs to input `input_order[j]` (GPTQ's activation order). Raises ValueError for shapes and codes that do
    not fit."""
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
        codes, zeros, table = _whole_numbers(codes, zeros, bits)
    scheme = Scheme(bits, tuple(table), group, has_offsets=zeros is not None)
    parts = (codes.to(torch.uint8), scales, None if zeros is None else (zeros * scales).expand_as(scales))
    return QuantizedWeight(scheme, parts, dtype, input_order)


def quantize_int8(weight: torch.Tensor, dtype: torch.dtype, across: Across | None = None) -> QuantizedWeight:
    """Quantize `weight` (out, in) to 8 bits, symmetrically, with a scale for each output. `across`: maximum over ranks
    that have other inputs of the same outputs."""
    scheme = Scheme(8, _WHOLE, weight.shape[1], has_offsets=False)
    return QuantizedWeight(scheme, quantize(weight, scheme, across), dtype, across=across)


def quantize_nf4(
    weight: torch.Tensor, dtype: torch.dtype, group: int = 64, across: Across | None = None
) -> QuantizedWeight:
    """Quantize `weight` (out, in) to 4-bit NormalFloat, with a scale for each `group` inputs of an output. Groups begin
    at the first input of each rank, so no scale needs `across`."""
    scheme = Scheme(4, NF4, group, has_offsets=False)
    return QuantizedWeight(scheme, quantize(weight, scheme), dtype)


def _signed(magnitudes: Sequence[float]) -> tuple[float, ...]:
    """A table of 256 values: a sign bit, and 7 bits that index one of 128 magnitudes."""
    return (*magnitudes, *(-value for value in magnitudes))


_WHOLE = _signed([float(value) for value in range(128)])
"""-127 to 127."""
_HALVES = _signed([value + 0.5 for value in range(128)])
"""-127.5 to 127.5 in steps of 1: 256 values, all exact in bfloat16, for schemes with offsets."""


def _whole_numbers(
    codes: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor | None, Sequence[float]]:
    """Codes with value code - zero -> codes, zeros and their table. A zero point shared by all groups moves into the
    table if that leaves values of both signs; products then need no zero points."""
    lowest, highest = (int(edge) for edge in codes.aminmax())
    shift = (1 << bits - 1) if lowest < 0 else 0  # signed codes
    if lowest + shift < 0 or highest + shift >= 1 << bits:
        raise ValueError(f"codes from {lowest} to {highest} do not fit {bits} bits")
    zeros = torch.zeros(1, device=codes.device) if zeros is None else zeros
    zeros = zeros + shift
    shared = float(zeros.flatten()[0])
    is_shared = shared.is_integer() and bool((zeros == shared).all())
    if bits == 4:
        codes = _by_rows(codes, lambda part: part + shift)
        if is_shared and 0 < shared < 15:
            return codes, None, [value - shared for value in range(16)]
        return codes, zeros, [float(value) for value in range(16)]
    if is_shared and lowest + shift - shared >= -127 and highest + shift - shared <= 127:
        moved = shift - int(shared)
        return _by_rows(codes, lambda part: _with_sign_bit(part + moved)), None, _WHOLE
    # Code 0 stands for -127.5, code 255 for 127.5.
    codes = _by_rows(codes, lambda part: torch.where(part + shift < 128, 255 - part - shift, part + shift - 128))
    return codes, zeros - 127.5, _HALVES


def _with_sign_bit(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values < 0, 128 - values, values)


def _by_rows(codes: torch.Tensor, convert: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Convert a few rows at a time, as int16: temporaries of a vocabulary's size would take longer than the work."""
    found = torch.empty_like(codes, dtype=torch.uint8)
    for rows in row_slices(codes.shape, _CONVERTED_ENTRIES):
        found[rows] = convert(codes[rows].to(torch.int16))
    return found
