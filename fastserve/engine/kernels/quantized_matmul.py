"""Products with weights of 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A weight (out, in): value = table[code] * scale - offset."""

    codes: torch.Tensor
    """(out, in) or, of 4 bits, (out, in / 2) with the code of the earlier input in the lower half of a byte; uint8"""
    scales: torch.Tensor
    """(out, groups), float32"""
    offsets: torch.Tensor | None
    table: torch.Tensor
    """16 values, or 256 of which the second half is the first with its sign turned; float32"""
    first: float
    """The table's first value."""
    counts: bool
    """Whether the table (of 8 bits: its first half) counts up by one."""
    order: torch.Tensor | None
    """(in,) the input that each column of codes belongs to, int32"""
    width: int
    """in"""
    bits: int
    group: int
    """Neighbouring columns that share a scale."""


class QuantizedMatmul(Protocol):
    most_rows: int
    """Of more tokens, dequantizing the weight and a dense product are faster."""

    def supports(self, weight: QuantizedMatrix) -> bool: ...

    def product(self, x: torch.Tensor, weight: QuantizedMatrix) -> torch.Tensor:
        """`x` (rows, in), of at most `most_rows` rows -> (rows, out)"""
        ...
