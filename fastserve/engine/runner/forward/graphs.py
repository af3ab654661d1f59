"""Decoding steps as recorded graphs: replaying one launches the whole forward pass at once.

A decoding step on a GPU is hundreds of kernels of a few microseconds each, and Python needs longer to launch them than
they need to run. So the forward pass is recorded for some batch sizes over buffers that never move; a step fills the
buffers, replays the next larger recording, and reads as many rows of the logits as it has. Rows that only pad the batch
look at no pages and write none.

A sequence with a few new tokens (drafts of speculation, the end of a prompt) is taken as so many sequences over the
same pages: each layer stores the keys and values of all rows before any of them looks.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.attention.paged import AttentionMetadata, PagedAttention
from fastserve.engine.kernels.device_step import DeviceStep, IntArray, Items
from fastserve.engine.runner.sampled_ids import SampledIds

logger = logging.getLogger(__name__)

_SMALL_SIZES = (1, 2, 4, 8)
_SIZE_STEP = 16
_MOST_ROWS_OF_ONE = 9
"""New tokens of a sequence, each of which reads the whole context once more."""


class Recorder(Protocol):
    """Makes a function over fixed buffers repeatable. It may call it several times while it records."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does the same as `run` again, on the same memory."""
        ...


class CudaGraphRecorder:
    """All graphs share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        # Libraries make their workspaces, and Triton its binaries, at the first call: neither can be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            # A capture that fails can leave the device's memory in a state of its own: what waits for the device is
            # found out before.
            with waiting_is_an_error():
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Operations of torch that wait for the device raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that this finds most of what waits, and not all
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class DecodeGraphs:
    """Runs the steps in which every sequence has one new token or a few. One thread calls it."""

    def __init__(
        self,
        model: torch.nn.Module,
        attention: PagedAttention,
        recorder: Recorder,
        drawn: SampledIds,
        device: torch.device,
        *,
        max_rows: int,
        max_blocks: int,
    ) -> None:
        """`attention` must take device steps. `max_blocks` of one sequence. What the model's code cannot have recorded
        (a wait for the device, for one) comes as RuntimeError."""
        self._model = model
        self._attention = attention
        self._drawn = drawn
        self.sizes = batch_sizes(max_rows)
        self._logits: torch.Tensor | None = None
        with torch.inference_mode():
            self._inputs = _Inputs(self.sizes[-1], max_blocks, device)
            # The largest first: the smaller ones then find the memory that they need in the pool.
            self._replays = {size: recorder.record(self._forward_of(size)) for size in reversed(self.sizes)}

    def fits(self, context: AttentionMetadata) -> bool:
        counts = context.counts
        return int(counts.sum()) <= self.sizes[-1] and int(counts.max()) <= _MOST_ROWS_OF_ONE

    def run(
        self,
        input_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        context: AttentionMetadata,
        block_size: int,
    ) -> torch.Tensor:
        """Logits (rows, vocabulary) of a step that fits, for all its rows. They hold until the next step. Among
        `input_ids` may be stand-ins for ids that the last step drew."""
        count = len(input_ids)
        slots = context.token_block * block_size + context.token_offset
        table = np.repeat(context.block_table, context.counts, axis=0)
        with torch.inference_mode():
            self._inputs.fill(input_ids, positions, positions + 1, slots, table)
            self._replays[next(size for size in self.sizes if size >= count)]()
        if self._logits is None:
            raise RuntimeError("nothing was recorded")
        return self._logits[:count]

    def _forward_of(self, size: int) -> Callable[[], None]:
        step = self._inputs.step(size)

        def forward() -> None:
            self._attention.context = step
            input_ids = self._inputs.ids[:size]
            self._drawn.fill_in(input_ids)
            logits = self._model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=self._inputs.positions[:size].unsqueeze(0),
                use_cache=False,
            ).logits[0]
            if self._logits is None:
                # One for all sizes: the recordings would otherwise keep one each.
                self._logits = logits.clone()
            self._logits[:size].copy_(logits)

        return forward


class _Inputs:
    """What a recorded step reads, at addresses that never change."""

    def __init__(self, size: int, max_blocks: int, device: torch.device) -> None:
        self._size = size
        # Token ids and positions as int64, then contexts and slots as int32: filled by one transfer.
        self._packed = torch.zeros(6 * size, dtype=torch.int32, device=device)
        self.ids, self.positions, self._contexts, self._slots = _parts(self._packed, size)
        self._table = torch.zeros((size, max_blocks), dtype=torch.int32, device=device)
        self._numbers = torch.arange(size, dtype=torch.int32, device=device)
        self._ones = torch.ones(size, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(size, dtype=torch.int32, device=device)
        self._slots.fill_(-1)

    def step(self, size: int) -> DeviceStep:
        numbers = self._numbers[:size]
        nothing = numbers[:0]
        host = np.ones(size, dtype=np.int32)
        return DeviceStep(
            numbers, self._ones[:size], self._contexts[:size], self._table[:size], self._slots[:size], host, host,
            fixed=Items((numbers, self._zeros[:size]), size, 1, (nothing, nothing), 0),
        )  # fmt: skip

    def fill(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        contexts: npt.NDArray[np.int64],
        slots: IntArray,
        block_table: IntArray,
    ) -> None:
        """Arrays (rows, ...), each row a sequence with one new token."""
        # New each time, from torch's cache of pinned memory: the last step's may still be on its way.
        pinned = self._packed.device.type == "cuda"
        staging = torch.zeros(6 * self._size, dtype=torch.int32, pin_memory=pinned)
        count = len(ids)
        to_ids, to_positions, to_contexts, to_slots = (part.numpy() for part in _parts(staging, self._size))
        to_ids[:count] = ids
        to_positions[:count] = positions
        to_contexts[:count] = contexts
        to_slots[:count] = slots
        to_slots[count:] = -1
        self._packed.copy_(staging, non_blocking=True)
        table = torch.empty(block_table.shape, dtype=torch.int32, pin_memory=pinned)
        table.numpy()[...] = block_table
        self._table[:count, : block_table.shape[1]].copy_(table, non_blocking=True)


def _parts(packed: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """(token ids, positions, contexts, slots)"""
    wide = packed[: 4 * size].view(torch.int64)
    return wide[:size], wide[size:], packed[4 * size : 5 * size], packed[5 * size :]


def batch_sizes(most: int) -> tuple[int, ...]:
    """What is recorded: few rows are padding, and few sizes take memory and time at start."""
    sizes = [size for size in (*_SMALL_SIZES, *range(_SIZE_STEP, most, _SIZE_STEP)) if size < most]
    return (*sizes, most)


def record_decode_graphs(
    model: torch.nn.Module,
    attention: PagedAttention,
    drawn: SampledIds,
    device: torch.device,
    *,
    max_rows: int,
    max_blocks: int,
) -> DecodeGraphs | None:
    """None where steps cannot be recorded: they are then run one kernel at a time."""
    if device.type != "cuda" or not attention.takes_device_steps:
        return None
    try:
        recorder = CudaGraphRecorder()
        return DecodeGraphs(model, attention, recorder, drawn, device, max_rows=max_rows, max_blocks=max_blocks)
    except RuntimeError as error:
        logger.warning("Decoding without CUDA graphs: %s cannot be recorded (%s).", type(model).__name__, error)
        return None
