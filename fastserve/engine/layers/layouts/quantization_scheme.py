"""Schemes of weights of 8 or 4 bits, and how values become codes.

Every scheme here is one rule: value = table[code] * scale - offset, with a scale (and where a scheme is asymmetric, an
offset) for each output and group of inputs. The table is what makes a scheme: whole numbers (int8, GPTQ, AWQ), or the
quantiles of a normal distribution (nf4). Products with tables of whole numbers are as exact as the activations are;
none of these layouts quantizes activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fastserve.engine.kernels.packed_linear import UNIT

QuantizedParts: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""codes (out, in) uint8, a byte each; scales and offsets (out, groups) float32"""
_QUANTIZED_ENTRIES = 1 << 18
"""How many entries are quantized at once: they stay in the caches of a CPU for all passes over them."""


@dataclass(frozen=True, slots=True)
class Scheme:
    bits: int
    """8 or 4"""
    table: tuple[float, ...]
    """What a code stands for: 16 entries, or 256 of which the second half is the first with its sign turned."""
    group: int
    """Neighbouring inputs that share a scale; the last group of an output may be shorter."""
    has_offsets: bool


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedParts:
    """Each value becomes the nearest of the table's, scaled so that the largest of a group (with offsets: both the
    smallest and the largest) is at the table's end."""
    order, table = _sorted_table(scheme.table, weight.device)
    found = [
        _quantize_rows(weight[rows].float(), scheme, order, table)
        for rows in row_slices(weight.shape, _QUANTIZED_ENTRIES)
    ]
    codes, scales, offsets = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(scales), torch.cat(offsets) if scheme.has_offsets else None


def _quantize_rows(weight: torch.Tensor, scheme: Scheme, order: torch.Tensor, table: torch.Tensor) -> QuantizedParts:
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


def row_slices(shape: Sequence[int], entries: int) -> Iterator[slice]:
    """Rows of about so many entries, beginning with a unit."""
    step = max(UNIT, entries // shape[1] // UNIT * UNIT)
    yield from (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))
