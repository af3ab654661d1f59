"""The binding of attention.h: numpy arrays and tensors in, plain C structures out."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.kernels.build import cpu_library

LANES = 16
IntArray = npt.NDArray[np.int32]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("item_token", "item_count", "item_position", "item_sequence")),
        *((name, ctypes.c_void_p) for name in ("block_table", "token_block", "token_offset")),
        *((name, ctypes.c_int64) for name in ("items", "tokens", "table_stride")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "keys", "values", "sinks")),
        *((name, ctypes.c_int64) for name in ("query_token", "query_head", "key_token", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_token", "value_head")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "key_dim", "value_dim", "block_size")),
        *((name, ctypes.c_int64) for name in ("window", "chunk")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    ]


@dataclass(frozen=True, slots=True)
class KernelStep:
    """A C struct of a step, and the arrays that it points to."""

    struct: _Step
    arrays: tuple[IntArray, ...]


class PagedAttentionKernel:
    """Called once for each layer and step: stores the new keys and values and computes attention."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run: Any = library.paged_attention
        self._max_rows: int = library.max_rows()

    @classmethod
    def load(cls, dtype: torch.dtype) -> PagedAttentionKernel | None:
        library = cpu_library(dtype)
        return None if library is None else cls(library)

    def supports(self, block_size: int, group: int, key_dim: int, value_dim: int) -> bool:
        return block_size % LANES == 0 and group <= self._max_rows and max(key_dim, value_dim) <= 512

    def make_step(
        self,
        starts: IntArray,
        counts: IntArray,
        positions: IntArray,
        block_table: IntArray,
        token_block: IntArray,
        token_offset: IntArray,
        group: int,
    ) -> KernelStep:
        """Split the step into work items: up to as many neighbouring tokens of a sequence as one pass over the KV cache
        can serve. For the other arguments see `AttentionMetadata`; `group`: query heads per KV head."""
        size = max(1, self._max_rows // group)
        per_sequence = -(-counts // size)
        sequence = np.repeat(np.arange(len(counts), dtype=np.int32), per_sequence)
        ends = np.cumsum(per_sequence)
        within = (np.arange(ends[-1]) - np.repeat(ends - per_sequence, per_sequence)).astype(np.int32) * size
        count = np.minimum(size, counts[sequence] - within)
        # Longest contexts first: short ones at the end make the threads finish together.
        order = np.argsort(-(positions[sequence] + within), kind="stable")
        arrays = tuple(
            np.ascontiguousarray(array, dtype=np.int32)
            for array in (
                (starts[sequence] + within)[order],
                count[order],
                (positions[sequence] + within)[order],
                sequence[order],
                block_table,
                token_block,
                token_offset,
            )
        )
        struct = _Step(*(array.ctypes.data for array in arrays), len(order), len(token_block), block_table.shape[1])
        return KernelStep(struct, arrays)

    def __call__(
        self,
        step: KernelStep,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        chunk: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`query` (tokens, heads, dim), `key` and `value` (tokens, KV heads, dim), any strides with a dense last
        dimension; `keys` (blocks, KV heads, dim, block size), `values` (blocks, KV heads, block size, dim), both dims
        padded and in the layout of attention.h."""
        query, key, value = (_dense(tensor) for tensor in (query, key, value))
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        sinks = None if sinks is None else sinks.float().contiguous()
        layer = _Layer(
            *(tensor.data_ptr() for tensor in (query, key, value, out, keys, values)),
            None if sinks is None else sinks.data_ptr(),
            *(stride for tensor in (query, key, value) for stride in tensor.stride()[:2]),
            query.shape[1],
            key.shape[1],
            key.shape[2],
            value.shape[2],
            values.shape[2],
            window or 0,
            chunk or 0,
            scaling,
            softcap or 0.0,
        )
        if self._run(ctypes.byref(step.struct), ctypes.byref(layer)):
            raise RuntimeError("the paged attention kernel was called with a shape it does not support")
        return out


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
