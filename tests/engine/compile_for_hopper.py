"""Compiles kernels for an H100 with Triton's real compiler, which needs no GPU; prints what the machine code uses.

A program of its own: within the tests' process, kernels are interpreted.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastserve.engine.kernels import triton_attention as attention
from fastserve.engine.kernels import triton_elementwise as elementwise
from fastserve.engine.kernels import triton_lora as lora
from fastserve.engine.kernels import triton_quantized as codes

_HOPPER = GPUTarget("cuda", 90, 32)
_UINT8 = {"codes"}
_INT32 = {"order", "slot_mapping", "block_table", "starts", "counts", "seq_lens", "item_sequence", "item_first"}
_INT32 |= {"first_tile", "rank_groups", "row_index", "piece_slot", "piece_begin", "piece_end"}
_INT64 = {"planes"}
_FLOAT32 = {"scales", "offsets", "table", "parts", "part_peaks", "part_totals"}
_FLOATS = {"scaling", "softcap", "eps", "offset"}
_UNALIGNED = {"rows", "table_stride", "min_split", "part_tokens"}
_STRIDES = {
    "query_token",
    "query_head",
    "key_token",
    "key_head",
    "value_token",
    "value_head",
    "x_token",
    "x_head",
    "x_row",
    "out_row",
}


def type_of(name: str) -> str:
    if name in _FLOATS:
        return "fp32"
    if name in _UNALIGNED | _STRIDES:
        return "i32"
    if name in _UINT8:
        return "*u8"
    if name in _INT64:
        return "*i64"
    return "*i32" if name in _INT32 else "*fp32" if name in _FLOAT32 else "*bf16"


def compile_kernel(kernel: Any, constants: dict[str, Any], **options: int) -> dict[str, int]:
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(name) for name in names}
    aligned = [name for name in names if name not in constants and name not in _FLOATS | _UNALIGNED]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    ptx: str = triton.compile(source, target=_HOPPER, options=options).asm["ptx"]
    return {word: ptx.count(word) for word in ("wgmma.mma_async", "mma.sync", "cp.async", "cp.async.cg")}


def compile_attention(tiling: attention.Tiling, splits: int, window: int, block_size: int) -> dict[str, int]:
    shape = {"GROUP": 4, "KV_HEADS": 8, "KEY_DIM": 128, "VALUE_DIM": 128, "KEY_PADDED": 128, "VALUE_PADDED": 128}
    constants = shape | {
        "BLOCK_SIZE": block_size, "WINDOW": window, "CHUNK": 64 * window, "HAS_SOFTCAP": bool(window),
        "HAS_SINKS": bool(window),
        "IN_FLOAT32": False, "ROWS": tiling.rows, "TILE": tiling.tile, "SPLITS": splits,
    }  # fmt: skip
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    return compile_kernel(attention._attend, constants, **options)


def compile_codes(bits: int, rows: int, **options: Any) -> dict[str, int]:
    constants = {
        "OUT": 4096, "IN": 4096, "GROUP": 128, "GROUPS": 32, "BITS": bits, "FIRST": 0.0, "COUNTS": True,
        "HAS_OFFSETS": True, "HAS_ORDER": False, "IN_FLOAT32": False, "ROWS": rows, "OUTPUTS": 64, "DEPTH": 128,
        "SPLITS": 4,
    }  # fmt: skip
    return compile_kernel(codes._multiply, constants | options, num_warps=4, num_stages=4)


def compile_lora(kernel: Any, **more: int) -> dict[str, int]:
    constants = {"IN": 4096, "WIDTH": 128, "PER_PLANE": 8, "SPLITS": 8, "MAX_RANK": lora.MAX_RANK, "ROWS": 16}
    return compile_kernel(kernel, constants | {"IN_FLOAT32": False} | more, num_warps=4)


def main() -> None:
    wide, narrow = attention.wide_tiling(4, 128, 2), attention.narrow_tiling(4, 128, 2)
    heads = {
        "KV_HEADS": 8,
        "KEY_DIM": 128,
        "VALUE_DIM": 128,
        "BLOCK_SIZE": 16,
        "KEY_PADDED": 1024,
        "VALUE_PADDED": 1024,
    }
    join = {
        "HEADS": 32,
        "VALUE_DIM": 128,
        "VALUE_PADDED": 128,
        "WINDOW": 0,
        "CHUNK": 0,
        "TOKENS": 4,
        "TILE": 64,
        "SPLITS": 32,
    }
    rotary = {"HEADS": 32, "DIM": 128, "HEAD_BLOCK": 32, "HALF_BLOCK": 64}
    found = {
        "wide": compile_attention(wide, 1, 0, 16),
        "wide, all options": compile_attention(wide, 1, 128, 64),
        "narrow": compile_attention(narrow, 16, 0, 16),
        "store": compile_kernel(attention._store, heads),
        "join": compile_kernel(attention._join, join),
        "rms_norm": compile_kernel(elementwise._rms_norm, {"SIZE": 4096, "BLOCK": 4096}, num_warps=8),
        "silu_and_mul": compile_kernel(elementwise._silu_and_mul, {"SIZE": 14336, "BLOCK": 1024}),
        "4 bits": compile_codes(4, 16),
        "4 bits, all options": compile_codes(4, 64, COUNTS=False, HAS_ORDER=True),
        "8 bits": compile_codes(8, 16),
        "8 bits, all options": compile_codes(8, 64, COUNTS=False, HAS_ORDER=True),
        "shrink": compile_lora(lora._shrink),
        "expand": compile_lora(lora._expand, OUT=14336, OUT_BEGIN=0),
        "rotary": compile_kernel(elementwise._rotary, rotary),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
