"""Schemes of 8-bit and 4-bit weights, and quantization by them.

In every scheme, value = table[code] * scale - offset, with a scale (and an offset, if the scheme is asymmetric) for
each output and group of inputs. Schemes differ in their table: integers (int8, GPTQ, AWQ), or the quantiles of a normal
distribution (nf4). Products with integer tables are as exact as the activations; no layout here quantizes activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fastserve.engine.kernels.packed_linear import UNIT
from fastserve.engine.layers.layouts.layout import Across

QuantizedParts: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""codes (out, in) uint8, one code a byte; scales and offsets (out, groups) float32"""
_QUANTIZED_ENTRIES = 1 << 18
"""Entries quantized at once, few enough to stay in the CPU's caches during all passes."""


@dataclass(frozen=True, slots=True)
class Scheme:
    bits: int
    """8 or 4"""
    table: tuple[float, ...]
    """Value of each code: 16 entries, or 256 whose second half is the first half negated."""
    group: int
    """Neighbouring inputs that share a scale; the last group of an output may be shorter."""
    has_offsets: bool


def quantize(weight: torch.Tensor, scheme: Scheme, across: Across | None = None) -> QuantizedParts:
    """Round each value to the nearest of the table. Scales map a group's largest magnitude (with offsets: its smallest
    and its largest value) to the ends of the table. `across`: maximum over ranks that have other inputs of the same
    outputs, for a scheme with one scale for each output."""
    order, table = _sorted_table(scheme.table, weight.device)
    slices = list(row_slices(weight.shape, _QUANTIZED_ENTRIES))
    largest = None
    if across is not None:
        largest = across(torch.cat([weight[rows].float().abs().amax(-1, keepdim=True) for rows in slices]))
    found = [
        _quantize_rows(weight[rows].float(), scheme, order, table, None if largest is None else largest[rows])
        for rows in slices
    ]
    codes, scales, offsets = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(scales), torch.cat(offsets) if scheme.has_offsets else None


def _quantize_rows(
    weight: torch.Tensor, scheme: Scheme, order: torch.Tensor, table: torch.Tensor, largest: torch.Tensor | None
) -> QuantizedParts:
    """`largest`: magnitudes (out, groups) instead of those of the weight itself."""
    out, width = weight.shape
    groups = -(-width // scheme.group)
    # A shorter last group is padded with its last column.
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
        scales = (values.abs().amax(-1) if largest is None else largest) / min(high, -low)
    divisors = torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    codes = order[_nearest(values / divisors, table).int()]
    return codes.view(out, -1)[:, :width], scales, offsets


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """For each value, the index of the nearest entry of the sorted table."""
    step = table[1] - table[0]
    if (table.diff() == step).all():
        return ((values - table[0]) / step).round_().clamp_(0, len(table) - 1)
    # Vectorized, one pass for each entry is faster than a search for each value.
    found = torch.zeros_like(values, dtype=torch.uint8)
    for middle in ((table[1:] + table[:-1]) / 2).tolist():
        found += values > middle
    return found


def _sorted_table(table: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The table's distinct finite values in ascending order, and their codes: (codes, values)."""
    first = {value: code for code, value in reversed(list(enumerate(table))) if math.isfinite(value)}
    values = sorted(first)
    codes = torch.tensor([first[value] for value in values], dtype=torch.uint8, device=device)
    return codes, torch.tensor(values, device=device)


def row_slices(shape: Sequence[int], entries: int) -> Iterator[slice]:
    """Slices of rows with about `entries` entries each, beginning at multiples of UNIT."""
    step = max(UNIT, entries // shape[1] // UNIT * UNIT)
    yield from (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))
