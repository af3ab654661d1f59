"""Decode steps as recorded graphs (CUDA graphs): replaying one launches the whole forward pass at once.

A decode step on a GPU is hundreds of kernels of a few microseconds each, and Python takes longer to launch them than
they take to run. So the forward pass is recorded for some batch sizes over fixed buffers; a step fills the buffers,
replays the next larger graph, and reads its rows of the logits. Rows that pad the batch neither read nor write the KV
cache.

A sequence with a few new tokens (drafts, the end of a prompt) is computed as as many sequences over the same blocks:
each layer stores the keys and values of all rows before it computes attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.devices.device import Device, Recorder
from fastserve.engine.devices.find import device_of
from fastserve.engine.kernels.device_step import DeviceStep, IntArray, WorkItems
from fastserve.engine.kernels.lora import RecordedRows
from fastserve.engine.runner.forward.forward_pass import AbsentError, ForwardParts, UnsupportedError
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.transfers import to_device

logger = logging.getLogger(__name__)

_SMALL_SIZES = (1, 2, 4, 8)
_SIZE_STEP = 16
_MAX_TOKENS_OF_SEQUENCE = 9
"""Maximum number of new tokens of a sequence, each of which reads the whole context again."""


class GraphForward:
    """Computes steps in which every sequence has one or a few new tokens. Not thread-safe."""

    name: ClassVar[str] = "graphs"
    follows_description: ClassVar[bool] = False

    def __init__(self, parts: ForwardParts, recorder: Recorder) -> None:
        """The attention must take device steps. Raises RuntimeError when the model's code cannot be recorded, for
        example because it waits for the device."""
        self._parts = parts
        self.sizes = batch_sizes(parts.max_num_seqs)
        self._logits: torch.Tensor | None = None
        max_blocks = -(-parts.max_model_len // parts.block_size)
        with torch.inference_mode():
            self._inputs = _Inputs(self.sizes[-1], max_blocks, device_of(parts.device))
            # Largest first: smaller graphs then reuse its memory in the pool.
            self._replays = {size: recorder.record(self._forward_of(size, None)) for size in reversed(self.sizes)}
            self._adapter_rows = self._find_adapter_rows()
            self._adapter_replays: dict[int, Callable[[], None]] = {}
            """Of steps with adapters; the others have no products for them."""
            if self._adapter_rows is not None:
                self._adapter_replays = {
                    size: recorder.record(self._forward_of(size, self._adapter_rows.first(size)))
                    for size in reversed(self.sizes)
                }

    @classmethod
    def build(cls, parts: ForwardParts) -> Self:
        recorder = device_of(parts.device).graph_recorder()
        if recorder is None:
            raise AbsentError("steps cannot be recorded on this device")
        backend = parts.attention.backend
        if backend is None or not backend.takes_device_steps:
            raise UnsupportedError("attention reads arrays on the host")
        try:
            return cls(parts, recorder)
        except RuntimeError as error:
            name = type(parts.model).__name__
            logger.warning("Decoding without CUDA graphs: %s cannot be recorded (%s).", name, error)
            raise UnsupportedError(f"the model cannot be recorded ({error})") from error

    def supports(self, step: PackedStep) -> str | None:
        counts = step.metadata.counts
        if len(step.input_ids) > self.sizes[-1] or int(counts.max()) > _MAX_TOKENS_OF_SEQUENCE:
            return "it has more new tokens than are recorded"
        adapters = self._parts.adapters
        if step.adapters is not None and adapters is not None and adapters.computes:
            if self._adapter_rows is None:
                return "it has rows with adapters, whose products cannot be recorded"
            if adapters.changes_experts(step.adapters):
                return "its adapters change experts"
        return None

    def __call__(self, step: PackedStep) -> torch.Tensor:
        logits = self._replay(step)
        rows = step.logit_rows
        if np.array_equal(rows, np.arange(len(logits))):
            return logits
        return logits[to_device([rows], logits.device)[0]]

    def _replay(self, step: PackedStep) -> torch.Tensor:
        """Logits (tokens, vocabulary)."""
        metadata, count = step.metadata, len(step.input_ids)
        slot_mapping = metadata.token_block * self._parts.block_size + metadata.token_offset
        table = np.repeat(metadata.block_table, metadata.counts, axis=0)
        # Not the positions of the tokens: the start check places tokens at far positions of a short sequence.
        contexts = np.repeat(metadata.positions - metadata.starts, metadata.counts) + np.arange(1, count + 1)
        with torch.inference_mode():
            self._inputs.fill(step.input_ids, step.positions, contexts, slot_mapping, table, metadata.is_long)
            replays = self._replays
            if step.adapters is not None and self._adapter_rows is not None and self._computes_adapters(step):
                self._adapter_rows.fill(step.adapters)
                replays = self._adapter_replays
            replays[next(size for size in self.sizes if size >= count)]()
        if self._logits is None:
            raise RuntimeError("nothing was recorded")
        return self._logits[:count]

    def _computes_adapters(self, step: PackedStep) -> bool:
        return step.adapters is not None and self._parts.adapters is not None and self._parts.adapters.computes

    def _find_adapter_rows(self) -> RecordedRows | None:
        adapters = self._parts.adapters
        if adapters is None or adapters.kernel is None or not adapters.computes:
            return None
        return adapters.kernel.recorded_rows(self.sizes[-1], self._parts.device)

    def _forward_of(self, size: int, adapter_rows: RecordedRows | None) -> Callable[[], None]:
        step = self._inputs.step(size)

        def forward() -> None:
            input_ids = self._inputs.ids[:size]
            self._parts.sampled_ids.fill_in(input_ids)
            adapters = nullcontext() if self._parts.adapters is None else self._parts.adapters.running(adapter_rows)
            with self._parts.attention.running(step), adapters:
                logits = self._parts.model(
                    input_ids=input_ids.unsqueeze(0),
                    position_ids=self._inputs.positions[:size].unsqueeze(0),
                    use_cache=False,
                ).logits[0]
            if self._logits is None:
                # One tensor for all sizes: otherwise each graph would keep its own.
                self._logits = logits.clone()
            self._logits[:size].copy_(logits)

        return forward


class _Inputs:
    """Input buffers of recorded steps, at fixed addresses."""

    def __init__(self, size: int, max_blocks: int, on: Device) -> None:
        self._size = size
        self._on = on
        device = on.torch_device
        # Token ids and positions as int64, then sequence lengths, slots and kinds of rotary frequencies as int32:
        # filled by one transfer.
        self._packed = torch.zeros(7 * size, dtype=torch.int32, device=device)
        self.ids, self.positions, self._seq_lens, self._slot_mapping, self._is_long = _parts(self._packed, size)
        self._table = torch.zeros((size, max_blocks), dtype=torch.int32, device=device)
        self._numbers = torch.arange(size, dtype=torch.int32, device=device)
        self._ones = torch.ones(size, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(size, dtype=torch.int32, device=device)
        self._slot_mapping.fill_(-1)

    def step(self, size: int) -> DeviceStep:
        numbers = self._numbers[:size]
        nothing = numbers[:0]
        host = np.ones(size, dtype=np.int32)
        return DeviceStep(
            numbers, self._ones[:size], self._seq_lens[:size], self._table[:size], self._slot_mapping[:size],
            host, host, self._on.send, self._is_long[:size],
            fixed_items=WorkItems((numbers, self._zeros[:size]), size, 1, (nothing, nothing), 0),
        )  # fmt: skip

    def fill(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        seq_lens: npt.NDArray[np.int64],
        slot_mapping: IntArray,
        block_table: IntArray,
        is_long: npt.NDArray[np.bool_] | None,
    ) -> None:
        """Arrays (rows, ...), each row a sequence with one new token."""
        # Allocated each time from torch's cache of pinned memory: the last step's may still be in transfer.
        pinned = self._on.pins_memory
        staging = torch.zeros(7 * self._size, dtype=torch.int32, pin_memory=pinned)
        count = len(ids)
        to_ids, to_positions, to_seq_lens, to_slot_mapping, to_is_long = (
            part.numpy() for part in _parts(staging, self._size)
        )
        to_ids[:count] = ids
        to_positions[:count] = positions
        to_seq_lens[:count] = seq_lens
        to_slot_mapping[:count] = slot_mapping
        to_slot_mapping[count:] = -1
        to_is_long[:count] = 0 if is_long is None else is_long
        self._packed.copy_(staging, non_blocking=True)
        table = torch.empty(block_table.shape, dtype=torch.int32, pin_memory=pinned)
        table.numpy()[...] = block_table
        self._table[:count, : block_table.shape[1]].copy_(table, non_blocking=True)


def _parts(packed: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """(token ids, positions, sequence lengths, slots, whether sequences are long)"""
    wide = packed[: 4 * size].view(torch.int64)
    return wide[:size], wide[size:], *packed[4 * size :].split(size)


def batch_sizes(max_size: int) -> tuple[int, ...]:
    """Batch sizes to record: a trade-off between padding and the memory and start time that each size takes."""
    sizes = [size for size in (*_SMALL_SIZES, *range(_SIZE_STEP, max_size, _SIZE_STEP)) if size < max_size]
    return (*sizes, max_size)
