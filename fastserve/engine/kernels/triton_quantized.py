# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of kernels are Triton's own values, which have no types that a checker knows.
"""Matrix products with quantized weights (8 or 4 bits) in Triton: codes are dequantized in registers.

For few tokens, where reading the weight takes all the time: 4 bits take a quarter of the time of bfloat16. As on CPUs
(quantized.h), table values times activations are summed first, and each group's sum is scaled in float32.

This module needs the package triton. With TRITON_INTERPRET=1 set before it is imported, it runs on a CPU.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastserve.engine.kernels.quantized_matmul import QuantizedMatrix

MAX_ROWS = 64
"""With more tokens, dequantizing the weight once and a dense product are faster."""
_OUTPUTS = 64
_DEPTHS = (128, 64, 32)
"""Possible numbers of inputs in a tile, all of one scale."""
_MIN_STEPS = 4
"""Minimum tiles in a part of a split sum."""


@triton.jit
def _read(table):
    """Load a table of 16 values, each into a register of its own."""
    return (
        tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3),
        tl.load(table + 4), tl.load(table + 5), tl.load(table + 6), tl.load(table + 7),
        tl.load(table + 8), tl.load(table + 9), tl.load(table + 10), tl.load(table + 11),
        tl.load(table + 12), tl.load(table + 13), tl.load(table + 14), tl.load(table + 15),
    )  # fmt: skip


@triton.jit
def _look_up(code, of):
    """The value of each code by a tree of selections, which is far faster than a read from memory for each."""
    odd = (code & 1) > 0
    second = (code & 2) > 0
    third = (code & 4) > 0
    four0 = tl.where(second, tl.where(odd, of[3], of[2]), tl.where(odd, of[1], of[0]))
    four1 = tl.where(second, tl.where(odd, of[7], of[6]), tl.where(odd, of[5], of[4]))
    four2 = tl.where(second, tl.where(odd, of[11], of[10]), tl.where(odd, of[9], of[8]))
    four3 = tl.where(second, tl.where(odd, of[15], of[14]), tl.where(odd, of[13], of[12]))
    return tl.where((code & 8) > 0, tl.where(third, four3, four2), tl.where(third, four1, four0))


@triton.jit
def _value(code, table, FIRST: tl.constexpr, BITS: tl.constexpr, COUNTS: tl.constexpr):
    """Values of codes. Tables that count up by one from FIRST are not read; those of 4 bits are a tuple."""
    if BITS == 4:
        found = code.to(tl.float32) + FIRST if COUNTS else _look_up(code, table)
    else:
        size = code & 127
        magnitude = size.to(tl.float32) + FIRST if COUNTS else tl.load(table + size)
        found = tl.where(code > 127, -magnitude, magnitude)
    return found


@triton.jit
def _inputs(x, order, row, at, rows, x_row, IN: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Inputs of some tokens for some columns of codes."""
    column = tl.load(order + at, mask=at < IN, other=0) if HAS_ORDER else at
    there = (row < rows)[:, None] & (at < IN)[None, :]
    return tl.load(x + row[:, None] * x_row + column[None, :], mask=there, other=0.0)


@triton.jit
def _multiply(
    x, codes, scales, offsets, table, order, out, rows, x_row,
    OUT: tl.constexpr, IN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    FIRST: tl.constexpr, COUNTS: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_ORDER: tl.constexpr,
    IN_FLOAT32: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS tokens, OUTPUTS outputs and one of SPLITS parts of the inputs; `out` (splits, rows, OUT) is
    float32."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    part = tl.program_id(2)
    valid = output < OUT
    STEPS: tl.constexpr = (IN + DEPTH - 1) // DEPTH
    KIND: tl.constexpr = tl.float32 if IN_FLOAT32 else x.dtype.element_ty
    BYTES: tl.constexpr = (IN * BITS + 7) // 8
    WIDTH: tl.constexpr = DEPTH * BITS // 8
    codes += output.to(tl.int64)[:, None] * BYTES
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    values = table if BITS == 8 or COUNTS else _read(table)
    for step in range(part * STEPS // SPLITS, (part + 1) * STEPS // SPLITS):
        byte = step * WIDTH + tl.arange(0, WIDTH)
        raw = tl.load(codes + byte[None, :], mask=valid[:, None] & (byte < BYTES)[None, :], other=0)
        if BITS == 8:
            value = _value(raw, values, FIRST, BITS, COUNTS).to(KIND)
            first = _inputs(x, order, row, byte, rows, x_row, IN, HAS_ORDER).to(KIND)
            sums = tl.dot(first, tl.trans(value), input_precision="ieee")
            whole = tl.sum(first.to(tl.float32), 1)
        else:
            low = _value(raw & 15, values, FIRST, BITS, COUNTS).to(KIND)
            high = _value(raw >> 4, values, FIRST, BITS, COUNTS).to(KIND)
            first = _inputs(x, order, row, 2 * byte, rows, x_row, IN, HAS_ORDER).to(KIND)
            second = _inputs(x, order, row, 2 * byte + 1, rows, x_row, IN, HAS_ORDER).to(KIND)
            sums = tl.dot(first, tl.trans(low), input_precision="ieee")
            sums = tl.dot(second, tl.trans(high), sums, input_precision="ieee")
            whole = tl.sum(first.to(tl.float32), 1) + tl.sum(second.to(tl.float32), 1)
        at = output * GROUPS + step * DEPTH // GROUP
        total += sums * tl.load(scales + at, mask=valid, other=0.0)[None, :]
        if HAS_OFFSETS:
            total -= whole[:, None] * tl.load(offsets + at, mask=valid, other=0.0)[None, :]
    out_at = out + (part * rows + row[:, None]) * OUT + output[None, :]
    tl.store(out_at, total, mask=(row < rows)[:, None] & valid[None, :])


class TritonQuantizedMatmul:
    """`QuantizedMatmul` for tensors on a GPU."""

    max_rows = MAX_ROWS

    def supports(self, weight: QuantizedMatrix) -> bool:
        return weight.group >= weight.width or _depth(weight) is not None

    def product(self, x: torch.Tensor, weight: QuantizedMatrix) -> torch.Tensor:
        x = x.contiguous()
        rows, out = x.shape[0], weight.codes.shape[0]
        depth = _depth(weight) or _DEPTHS[0]
        tile = max(16, triton.next_power_of_2(rows))
        splits = _splits(-(-out // _OUTPUTS), -(-weight.width // depth), x.device)
        parts = torch.empty(splits, rows, out, dtype=torch.float32, device=x.device)
        _multiply[(-(-out // _OUTPUTS), 1, splits)](
            x, weight.codes, weight.scales, weight.offsets, weight.table, weight.order, parts, rows, x.stride(0),
            out, weight.width, min(weight.group, weight.width), weight.scales.shape[1], weight.bits, weight.first,
            weight.counts, weight.offsets is not None, weight.order is not None,
            _INTERPRETED or x.dtype == torch.float32, tile, _OUTPUTS, depth, splits, num_warps=4, num_stages=4,
        )  # fmt: skip
        return parts.sum(0).to(x.dtype)


_INTERPRETED = not isinstance(_multiply, triton.runtime.JITFunction)
"""Triton's interpreter does not support products of bfloat16."""


def _depth(weight: QuantizedMatrix) -> int | None:
    if weight.group >= weight.width:
        return _DEPTHS[0]
    return next((depth for depth in _DEPTHS if weight.group % depth == 0), None)


def _splits(tiles: int, steps: int, device: torch.device) -> int:
    """Number of splits that gives each multiprocessor two programs, to hide the latency of loads."""
    return max(1, min(2 * _num_multiprocessors(device) // tiles, steps // _MIN_STEPS))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
