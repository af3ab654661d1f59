# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of kernels are Triton's own values, which have no types that a checker knows.
"""The small steps between matrix products in Triton: one pass over memory each, computed in float32.

This module needs the package triton. With TRITON_INTERPRET=1 set before it is imported, it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_GATED_AT_ONCE = 1024
_TURNED_AT_ONCE = 2048


@triton.jit
def _rms_norm(x, weight, out, eps, offset, SIZE: tl.constexpr, ROOM: tl.constexpr):
    """One program for each row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, ROOM)
    there = at < SIZE
    values = tl.load(x + row * SIZE + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + at, mask=there, other=0.0).to(tl.float32) + offset
    mean = tl.sum(values * values, 0) / SIZE
    values = values * (1.0 / tl.sqrt(mean + eps)) * scale
    tl.store(out + row * SIZE + at, values.to(out.dtype.element_ty), mask=there)


@triton.jit
def _silu_and_mul(x, out, SIZE: tl.constexpr, ROOM: tl.constexpr):
    """One program for each row and ROOM of its columns."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ROOM + tl.arange(0, ROOM)
    there = at < SIZE
    gate = tl.load(x + row * (2 * SIZE) + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + row * (2 * SIZE) + SIZE + at, mask=there, other=0.0).to(tl.float32)
    # exp2 overflows to infinity for large negative gates, and the quotient is then the 0 that it should be.
    gated = gate / (1.0 + tl.exp2(-gate * _LOG2_E))
    tl.store(out + row * SIZE + at, (gated * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _rotary(
    x, cos, sin, out, x_token, x_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, HEAD_ROOM: tl.constexpr, HALF_ROOM: tl.constexpr,
):  # fmt: skip
    """One program for each token and HEAD_ROOM of its heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_ROOM + tl.arange(0, HEAD_ROOM)
    HALF: tl.constexpr = DIM // 2
    at = tl.arange(0, HALF_ROOM)
    wave = token * DIM + at
    half = at < HALF
    there = (head < HEADS)[:, None] & half[None, :]
    from_low = x + token * x_token + head[:, None] * x_head + at[None, :]
    low = tl.load(from_low, mask=there, other=0.0).to(tl.float32)
    high = tl.load(from_low + HALF, mask=there, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + wave, mask=half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + wave + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + wave, mask=half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + wave + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
    to_low = out + (token * HEADS + head[:, None]) * DIM + at[None, :]
    tl.store(to_low, (low * cos_low - high * sin_low).to(out.dtype.element_ty), mask=there)
    tl.store(to_low + HALF, (high * cos_high + low * sin_high).to(out.dtype.element_ty), mask=there)


class TritonElementwiseKernels:
    """The methods of `ElementwiseKernels`, for tensors on a GPU."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        room = _power_of_two(size)
        _rms_norm[(x.numel() // size,)](x, weight, out, eps, offset, size, room, num_warps=_warps(room))
        return out

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 * size), gate and up side by side -> silu(gate) * up, (..., size)"""
        x = x.contiguous()
        size = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], size)
        room = min(_GATED_AT_ONCE, _power_of_two(size))
        _silu_and_mul[(x.numel() // (2 * size), -(-size // room))](x, out, size, room)
        return out

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`x` (1, heads, tokens, dim), `cos` and `sin` (1, tokens, dim): the rotary embedding by halves.

        The result lies in memory as (tokens, heads, dim).
        """
        if x.stride(3) != 1:
            x = x.contiguous()
        _, heads, tokens, dim = x.shape
        out = x.new_empty(1, tokens, heads, dim)
        half_room = _power_of_two(dim // 2)
        head_room = min(_power_of_two(heads), max(1, _TURNED_AT_ONCE // half_room))
        _rotary[(tokens, -(-heads // head_room))](
            x, cos.contiguous(), sin.contiguous(), out, x.stride(2), x.stride(1), heads, dim, head_room, half_room
        )
        return out.transpose(1, 2)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _warps(size: int) -> int:
    """So that each thread has at most 16 elements."""
    return min(16, max(1, size // 512))
