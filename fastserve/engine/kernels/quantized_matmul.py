"""The contract of matrix products with quantized weights (8 or 4 bits)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A quantized weight (out, in): value = table[code] * scale - offset."""

    codes: torch.Tensor
    """uint8: (out, in) with 8 bits, or (out, in / 2) with 4 bits, the earlier input in the lower half of each byte"""
    scales: torch.Tensor
    """(out, groups), float32"""
    offsets: torch.Tensor | None
    """(out, groups), float32"""
    table: torch.Tensor
    """float32: 16 values, or 256 of which the second half is the negated first half"""
    first: float
    """First value of the table."""
    counts: bool
    """Whether the table (with 8 bits: its first half) is first, first + 1, ..."""
    order: torch.Tensor | None
    """(in,) int32: the input to which each column of codes belongs; None: the same order"""
    width: int
    """Number of inputs."""
    bits: int
    """8 or 4."""
    group: int
    """Number of neighbouring columns that share a scale."""


class QuantizedMatmul(Protocol):
    max_rows: int
    """With more tokens, dequantizing the weight and a dense product are faster."""

    def supports(self, weight: QuantizedMatrix) -> bool: ...

    def product(self, x: torch.Tensor, weight: QuantizedMatrix) -> torch.Tensor:
        """`x` (rows, in), of at most `max_rows` rows -> (rows, out)"""
        ...
