# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of kernels are Triton's own values, which have no types that a checker knows.
"""Fused elementwise operations in Triton: one pass over memory each, computed in float32.

This module needs the package triton. With TRITON_INTERPRET=1 set before it is imported, it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_GATED_BLOCK = 1024
_ROTARY_BLOCK = 2048


@triton.jit
def _rms_norm(x, weight, out, eps, offset, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < SIZE
    values = tl.load(x + row * SIZE + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + at, mask=there, other=0.0).to(tl.float32) + offset
    mean = tl.sum(values * values, 0) / SIZE
    values = values * (1.0 / tl.sqrt(mean + eps)) * scale
    tl.store(out + row * SIZE + at, values.to(out.dtype.element_ty), mask=there)


@triton.jit
def _silu_and_mul(x, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each row and BLOCK of its columns."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < SIZE
    gate = tl.load(x + row * (2 * SIZE) + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + row * (2 * SIZE) + SIZE + at, mask=there, other=0.0).to(tl.float32)
    # exp2 overflows to infinity for large negative gates, which gives the correct quotient, 0.
    gated = gate / (1.0 + tl.exp2(-gate * _LOG2_E))
    tl.store(out + row * SIZE + at, (gated * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _rotary(
    x, cos, sin, out, x_token, x_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each token and HEAD_BLOCK of its heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    HALF: tl.constexpr = DIM // 2
    at = tl.arange(0, HALF_BLOCK)
    angle = token * DIM + at
    half = at < HALF
    there = (head < HEADS)[:, None] & half[None, :]
    from_low = x + token * x_token + head[:, None] * x_head + at[None, :]
    low = tl.load(from_low, mask=there, other=0.0).to(tl.float32)
    high = tl.load(from_low + HALF, mask=there, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + angle, mask=half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + angle + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + angle, mask=half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + angle + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
    to_low = out + (token * HEADS + head[:, None]) * DIM + at[None, :]
    tl.store(to_low, (low * cos_low - high * sin_low).to(out.dtype.element_ty), mask=there)
    tl.store(to_low + HALF, (high * cos_high + low * sin_high).to(out.dtype.element_ty), mask=there)


class TritonElementwiseKernels:
    """`ElementwiseOps` for tensors on a GPU."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        block = _power_of_two(size)
        _rms_norm[(x.numel() // size,)](x, weight, out, eps, offset, size, block, num_warps=_warps(block))
        return out

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 * size), gate and up side by side -> silu(gate) * up, (..., size)"""
        x = x.contiguous()
        size = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], size)
        block = min(_GATED_BLOCK, _power_of_two(size))
        _silu_and_mul[(x.numel() // (2 * size), -(-size // block))](x, out, size, block)
        return out

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of `x` (1, heads, tokens, dim) by halves (GPT-NeoX style); `cos` and `sin` (1, tokens, dim).

        The memory layout of the result is (tokens, heads, dim).
        """
        if x.stride(3) != 1:
            x = x.contiguous()
        _, heads, tokens, dim = x.shape
        out = x.new_empty(1, tokens, heads, dim)
        half_block = _power_of_two(dim // 2)
        head_block = min(_power_of_two(heads), max(1, _ROTARY_BLOCK // half_block))
        _rotary[(tokens, -(-heads // head_block))](
            x, cos.contiguous(), sin.contiguous(), out, x.stride(2), x.stride(1), heads, dim, head_block, half_block
        )
        return out.transpose(1, 2)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _warps(size: int) -> int:
    """Number of warps for at most 16 elements per thread."""
    return min(16, max(1, size // 512))
