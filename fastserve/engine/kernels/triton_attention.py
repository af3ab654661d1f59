# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of kernels are Triton's own values, which have no types that a checker knows.
"""Paged attention in Triton, for batches that mix decode and chunked prefill.

Scores of a tile of the KV cache update an online softmax, so no full row of scores is ever stored (FlashAttention-2:
Dao, 2023). The query heads that share a KV head are rows of one tile, so each block is read once for all of them.

There are two kinds of work items. A *wide* item is as many tokens of a chunk as fill a tile of the tensor cores; one
program loops over their whole context. A *narrow* item is a sequence with one or a few new tokens: its context is
divided into splits that run in parallel and are then combined in a fixed order (Flash-Decoding: Dao et al., 2023), so
that few sequences fill the GPU too, and equal steps give equal bits.

The KV cache has keys (blocks, KV heads, block size, key dim) and values (blocks, KV heads, block size, value dim): the
row of a token is contiguous, and so is one head's part of a block.

This module needs the package triton. With TRITON_INTERPRET=1 set before it is imported, it runs on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastserve.engine.kernels.device_step import DeviceStep

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)
"""Initial value of the running maximum: finite, so that fully masked rows give no NaN."""
_MIN_ROWS = 16
"""Minimum rows of a tile for tensor cores."""
_MAX_SPLITS = 64
_MIN_SPLITS = 8
_MIN_SPLIT_TOKENS = 512
"""Minimum tokens of a split when there are enough sequences to fill the GPU without splits; with fewer, less."""


# ---- kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _store(
    key, value, keys, values, slot_mapping,
    key_token, key_head, value_token, value_head,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEY_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """Store keys and values of new tokens in the KV cache. One program for each token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    row = slot % BLOCK_SIZE
    at = tl.arange(0, KEY_PADDED)
    head = at // KEY_DIM
    dim = at % KEY_DIM
    there = at < KV_HEADS * KEY_DIM
    found = tl.load(key + token * key_token + head * key_head + dim, mask=there)
    tl.store(keys + ((block * KV_HEADS + head) * BLOCK_SIZE + row) * KEY_DIM + dim, found, mask=there)
    at = tl.arange(0, VALUE_PADDED)
    head = at // VALUE_DIM
    dim = at % VALUE_DIM
    there = at < KV_HEADS * VALUE_DIM
    found = tl.load(value + token * value_token + head * value_head + dim, mask=there)
    tl.store(values + ((block * KV_HEADS + head) * BLOCK_SIZE + row) * VALUE_DIM + dim, found, mask=there)


@triton.jit
def _visible(
    seq_len, count, first, TOKENS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Positions [begin, end) that TOKENS new tokens from the `first` of `count` on attend to; `begin` is aligned to
    tiles."""
    position = seq_len - count + first
    end = tl.minimum(position + TOKENS, seq_len)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(position - WINDOW + 1, 0)
    if CHUNK > 0:
        begin = tl.maximum(begin, position // CHUNK * CHUNK)
    return begin // TILE * TILE, end


@triton.jit
def _split_size(length, min_split, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Tokens of one split: as many splits as allowed, but none smaller than `min_split`."""
    return tl.cdiv(tl.maximum(tl.cdiv(length, SPLITS), min_split), TILE) * TILE


@triton.jit
def _fold(
    acc, peak, total, rows, position, table, keys, values, begin, end, kv_head, scaling, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TILE: tl.constexpr,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Update the online softmax of `rows` (rows, key dim) with positions [begin, end).

    Without MASKED, every row attends to all of them, and they are whole tiles.
    """
    key_dim = tl.arange(0, KEY_PADDED)
    value_dim = tl.arange(0, VALUE_PADDED)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        if BLOCK_SIZE % TILE == 0:
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            slot = (block * KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE + tl.arange(0, TILE)
        else:
            if MASKED:
                block = tl.load(table + at // BLOCK_SIZE, mask=at < end, other=0).to(tl.int64)
            else:
                block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
            slot = (block * KV_HEADS + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
        # Beyond `end` a block may hold stale content of another request, NaN included: it is not read.
        key_at = keys + slot[:, None] * KEY_DIM + key_dim[None, :]
        value_at = values + slot[:, None] * VALUE_DIM + value_dim[None, :]
        if MASKED:
            key = tl.load(key_at, mask=(at < end)[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
        elif KEY_DIM == KEY_PADDED:
            key = tl.load(key_at)
        else:
            key = tl.load(key_at, mask=(key_dim < KEY_DIM)[None, :], other=0.0)
        scores = tl.dot(rows, tl.trans(key.to(rows.dtype)), input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)) is correct even where exp overflows or underflows
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * _LOG2_E * scaling / softcap))))
            scores = scores * _LOG2_E
        else:
            scores = scores * (scaling * _LOG2_E)
        if MASKED:
            seen = (at < end)[None, :] & (at[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (at[None, :] > position[:, None] - WINDOW)
            if CHUNK > 0:
                seen = seen & (at[None, :] >= position[:, None] // CHUNK * CHUNK)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fall = tl.exp2(peak - higher)
        total = total * fall + tl.sum(weights, 1)
        acc = acc * fall[:, None]
        peak = higher
        if MASKED:
            value = tl.load(value_at, mask=(at < end)[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0)
        elif VALUE_DIM == VALUE_PADDED:
            value = tl.load(value_at)
        else:
            value = tl.load(value_at, mask=(value_dim < VALUE_DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(rows.dtype), value.to(rows.dtype), acc, input_precision="ieee")
    return acc, peak, total


@triton.jit(do_not_specialize=["table_stride", "min_split", "part_tokens"])
def _attend(
    out, parts, part_peaks, part_totals, query, keys, values, block_table, starts, counts, seq_lens,
    item_sequence, item_first, sinks, scaling, softcap, query_token, query_head, table_stride, min_split, part_tokens,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, IN_FLOAT32: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program for each (KV head, item, split). Row r of its tile is new token r // GROUP, query head r % GROUP."""
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    split = tl.program_id(2)
    TOKENS: tl.constexpr = ROWS // GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP

    sequence = tl.load(item_sequence + item)
    first = tl.load(item_first + item)
    seq_len = tl.load(seq_lens + sequence)
    count = tl.load(counts + sequence)
    begin, end = _visible(seq_len, count, first, TOKENS, WINDOW, CHUNK, TILE)
    used = 1
    if SPLITS > 1:
        size = _split_size(end - begin, min_split, SPLITS, TILE)
        used = tl.cdiv(end - begin, size)
        # The first split of a row that pads the batch reads nothing, but writes its zeros.
        if (split > 0) & (split >= used):
            return
        begin = begin + split * size
        end = tl.minimum(end, begin + size)

    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = (row < TOKENS * GROUP) & (token < count)
    lowest = seq_len - count + first
    position = tl.minimum(seq_len - count + token, seq_len - 1)
    batch_row = (tl.load(starts + sequence) + token).to(tl.int64)
    key_dim = tl.arange(0, KEY_PADDED)
    value_dim = tl.arange(0, VALUE_PADDED)
    rows = tl.load(
        query + (batch_row * query_token + head * query_head)[:, None] + key_dim[None, :],
        mask=valid[:, None] & (key_dim < KEY_DIM)[None, :],
        other=0.0,
    )
    if IN_FLOAT32:
        rows = rows.to(tl.float32)

    acc = tl.zeros([ROWS, VALUE_PADDED], dtype=tl.float32)
    peak = tl.full([ROWS], _LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if HAS_SINKS:  # noqa: SIM102  # Triton decides this one when it compiles, the next one in each program
        # Attention sinks: a learned logit for each head in the softmax that belongs to no token (GPT-OSS).
        if split == 0:
            peak = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * _LOG2_E
            total = total + 1.0
    table = block_table + sequence.to(tl.int64) * table_stride
    bare = begin
    if (WINDOW == 0) and (CHUNK == 0):
        bare = tl.maximum(begin, tl.minimum(end, (lowest + 1) // TILE * TILE))
        acc, peak, total = _fold(
            acc, peak, total, rows, position, table, keys, values, begin, bare, kv_head, scaling, softcap,
            False, WINDOW, CHUNK, HAS_SOFTCAP, TILE,
            KV_HEADS, KEY_DIM, VALUE_DIM, KEY_PADDED, VALUE_PADDED, BLOCK_SIZE,
        )  # fmt: skip
    acc, peak, total = _fold(
        acc, peak, total, rows, position, table, keys, values, bare, end, kv_head, scaling, softcap,
        True, WINDOW, CHUNK, HAS_SOFTCAP, TILE,
        KV_HEADS, KEY_DIM, VALUE_DIM, KEY_PADDED, VALUE_PADDED, BLOCK_SIZE,
    )  # fmt: skip

    there = valid[:, None] & (value_dim < VALUE_DIM)[None, :]
    if used <= 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_at = out + ((batch_row * HEADS + head) * VALUE_DIM)[:, None] + value_dim[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=there)
    else:
        part = ((item * HEADS + head) * part_tokens + row // GROUP) * SPLITS + split
        tl.store(parts + part.to(tl.int64)[:, None] * VALUE_DIM + value_dim[None, :], acc, mask=there)
        tl.store(part_peaks + part, peak, mask=valid)
        tl.store(part_totals + part, total, mask=valid)


@triton.jit(do_not_specialize=["min_split", "part_tokens"])
def _join(
    out, parts, part_peaks, part_totals, starts, counts, seq_lens, item_sequence, min_split, part_tokens,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine the results of splits. One program for each (query head, narrow item, token of it)."""
    head = tl.program_id(0)
    item = tl.program_id(1)
    token = tl.program_id(2)
    sequence = tl.load(item_sequence + item)
    count = tl.load(counts + sequence)
    if token >= count:
        return
    begin, end = _visible(tl.load(seq_lens + sequence), count, 0, TOKENS, WINDOW, CHUNK, TILE)
    used = tl.cdiv(end - begin, _split_size(end - begin, min_split, SPLITS, TILE))
    if used <= 1:
        return
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, VALUE_PADDED)
    part = ((item * HEADS + head) * part_tokens + token) * SPLITS + split
    peaks = tl.load(part_peaks + part, mask=split < used, other=_LOWEST)
    totals = tl.load(part_totals + part, mask=split < used, other=0.0)
    weights = tl.exp2(peaks - tl.max(peaks, 0))
    found = tl.load(
        parts + part.to(tl.int64)[:, None] * VALUE_DIM + dim[None, :],
        mask=(split < used)[:, None] & (dim < VALUE_DIM)[None, :],
        other=0.0,
    )
    joined = tl.sum(found * weights[:, None], 0) / tl.sum(totals * weights, 0)
    batch_row = (tl.load(starts + sequence) + token).to(tl.int64)
    tl.store(out + (batch_row * HEADS + head) * VALUE_DIM + dim, joined.to(out.dtype.element_ty), mask=dim < VALUE_DIM)


# ---- launching --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes (query rows, context tokens), warps and pipeline stages of a kernel."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int


def wide_tiling(group: int, dim: int, itemsize: int) -> Tiling:
    """For wide items: as large as registers (a row of float32 for each query row) and shared memory allow."""
    if itemsize > 2:
        return Tiling(max(32, _power_of_two(group)), 32, 4, 2)
    rows = max(128, _power_of_two(group))
    if dim <= 64:
        return Tiling(rows, 64, 4, 3)
    return Tiling(rows, 64, 8, 3) if dim <= 128 else Tiling(rows, 32, 8, 2)


def narrow_tiling(group: int, dim: int, itemsize: int) -> Tiling:
    """For narrow items: minimum rows, and enough loads in flight to saturate memory bandwidth."""
    rows = max(_MIN_ROWS, _power_of_two(group))
    return Tiling(rows, 64 if dim * itemsize <= 256 else 32, 4, 3)


class TritonPagedAttention:
    """Called once for each layer and step: stores the new keys and values and computes attention."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
        else:
            self._multiprocessors = 8

    @staticmethod
    def supports(dtype: torch.dtype, group: int, key_dim: int, value_dim: int) -> bool:
        return (
            dtype in (torch.bfloat16, torch.float16, torch.float32) and group <= 128 and max(key_dim, value_dim) <= 256
        )

    def __call__(
        self,
        step: DeviceStep,
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
        """`query` (tokens, heads, key dim), `key` and `value` (tokens, KV heads, dim), any strides with a dense last
        dimension; `keys` and `values`: the layer's KV cache. Returns (tokens, heads, value dim)."""
        query, key, value = (_dense(tensor) for tensor in (query, key, value))
        self._store(step, key, value, keys, values)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        layer = _Layer(out, query, keys, values, scaling, window or 0, chunk or 0, softcap or 0.0, sinks)
        narrow, wide = layer.tilings
        items = step.items(narrow.rows // layer.group, wide.rows // layer.group)
        if items.num_narrow:
            self._attend_narrow(step, layer, narrow, items.narrow, items.num_narrow, items.max_narrow_tokens)
        if items.num_wide:
            layer.attend(step, wide, items.wide, (items.num_wide, 1), None)
        return out

    def _store(
        self, step: DeviceStep, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        _, kv_heads, block_size, key_dim = keys.shape
        value_dim = values.shape[3]
        _store[(step.slot_mapping.shape[0],)](
            key, value, keys, values, step.slot_mapping,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            kv_heads, key_dim, value_dim, block_size,
            _power_of_two(kv_heads * key_dim), _power_of_two(kv_heads * value_dim),
        )  # fmt: skip

    def _attend_narrow(
        self,
        step: DeviceStep,
        layer: _Layer,
        tiling: Tiling,
        items: tuple[torch.Tensor, torch.Tensor],
        count: int,
        max_tokens: int,
    ) -> None:
        splits, min_split = self.split(count * layer.kv_heads, tiling.tile)
        heads = layer.kv_heads * layer.group
        value_dim = layer.out.shape[2]
        parts = _Parts(
            layer.out.new_empty((count, heads, max_tokens, splits, value_dim), dtype=torch.float32),
            layer.out.new_empty((count, heads, max_tokens, splits), dtype=torch.float32),
            layer.out.new_empty((count, heads, max_tokens, splits), dtype=torch.float32),
            min_split,
            max_tokens,
        )
        layer.attend(step, tiling, items, (count, splits), parts)
        _join[(heads, count, max_tokens)](
            layer.out, parts.found, parts.peaks, parts.totals, step.starts, step.counts, step.seq_lens, items[0],
            min_split, max_tokens,
            heads, value_dim, _padded(value_dim), layer.window, layer.chunk,
            tiling.rows // layer.group, tiling.tile, splits,
        )  # fmt: skip

    def split(self, programs: int, tile: int) -> tuple[int, int]:
        """(maximum splits of a narrow item, minimum tokens of a split), for `programs` programs without splits.

        Depends on the batch size and not on sequence lengths, so that a captured graph serves all lengths. A long
        sequence among many short ones must be split too, or its single program outlasts all others.
        """
        target = 2 * self._multiprocessors
        splits = min(_MAX_SPLITS, max(_MIN_SPLITS, _power_of_two(-(-target // programs))))
        min_split = min(_MIN_SPLIT_TOKENS, _MIN_SPLIT_TOKENS * programs // target)
        return splits, max(tile, min_split // tile * tile)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Results of the splits of narrow items."""

    found: torch.Tensor
    """(items, heads, max tokens, splits, value dim) weighted sums of values, not normalised"""
    peaks: torch.Tensor
    """(items, heads, max tokens, splits) largest scores"""
    totals: torch.Tensor
    """(items, heads, max tokens, splits) sums of weights"""
    min_split: int
    """Minimum tokens of a split."""
    max_tokens: int
    """Maximum new tokens of an item."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Arguments of a layer that do not depend on the work items."""

    out: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    window: int
    chunk: int
    softcap: float
    sinks: torch.Tensor | None

    @property
    def kv_heads(self) -> int:
        return int(self.keys.shape[1])

    @property
    def group(self) -> int:
        return int(self.query.shape[1]) // self.kv_heads

    @property
    def tilings(self) -> tuple[Tiling, Tiling]:
        dim = max(_padded(self.keys.shape[3]), _padded(self.values.shape[3]))
        size: int = self.query.dtype.itemsize
        return narrow_tiling(self.group, dim, size), wide_tiling(self.group, dim, size)

    def attend(
        self,
        step: DeviceStep,
        tiling: Tiling,
        items: tuple[torch.Tensor, torch.Tensor],
        grid: tuple[int, int],
        parts: _Parts | None,
    ) -> None:
        """`grid` is (items, splits)."""
        unused = self.out
        if parts is None:
            parts = _Parts(unused, unused, unused, 0, 0)
        _, kv_heads, block_size, key_dim = self.keys.shape
        value_dim = self.values.shape[3]
        _attend[(kv_heads, *grid)](
            self.out, parts.found, parts.peaks, parts.totals, self.query, self.keys, self.values,
            step.block_table, step.starts, step.counts, step.seq_lens, *items,
            unused if self.sinks is None else self.sinks,
            self.scaling, self.softcap, self.query.stride(0), self.query.stride(1), step.block_table.stride(0),
            parts.min_split, parts.max_tokens,
            self.group, kv_heads, key_dim, value_dim, _padded(key_dim), _padded(value_dim), block_size, self.window,
            self.chunk, self.softcap > 0, self.sinks is not None, _INTERPRETED and self.query.dtype is torch.bfloat16,
            tiling.rows, tiling.tile, grid[1],
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip


_INTERPRETED = not isinstance(_attend, triton.runtime.JITFunction)
"""Triton's interpreter does not support products of bfloat16."""


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _padded(dim: int) -> int:
    """A head's dim padded to a power of two that tensor cores support."""
    return max(_MIN_ROWS, _power_of_two(dim))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
