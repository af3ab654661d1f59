"""The rows of a batch with their logits processors and the parameters on the device.

A batch seldom changes between steps, so all of this is kept. No processor is known here by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow, SamplingState, Stage
from fastserve.engine.transfers import to_device


class Outgoing:
    """Collects arrays for one transfer to a device."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []

    def add(self, arrays: Arrays) -> slice:
        """Add arrays; return their slice of the tensors that `send` returns."""
        begin = len(self._arrays)
        self._arrays += arrays
        return slice(begin, len(self._arrays))

    def send(self, device: torch.device) -> list[torch.Tensor]:
        return to_device(self._arrays, device)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the batch."""

    numbers: list[int]
    index: torch.Tensor | None
    """The row numbers on the device; None: all rows of the batch, in order."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Select these rows of a tensor (rows of the batch, ...)."""
        return tensor if self.index is None else tensor[self.index]


@dataclass(frozen=True, slots=True)
class AppliedProcessor:
    """A processor and the rows that it applies to."""

    processor: LogitsProcessor
    rows: list[tuple[int, int]]
    """(row of the values that it changes, row of the batch)"""
    batch_inputs: list[torch.Tensor]

    def step_inputs(self, rows: Sequence[SamplingRow], vocab_size: int) -> Arrays | None:
        """Arrays of the processor for this step. `rows`: all rows of the batch."""
        return self.processor.step_inputs(((at, rows[number]) for at, number in self.rows), vocab_size)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are sampled together."""

    rows: Rows
    temperature: torch.Tensor
    """(rows, 1)"""
    processors: list[AppliedProcessor]
    """Processors of Stage.PROBABILITIES. If empty, probabilities need not be sorted."""


@dataclass(frozen=True, slots=True)
class Batch:
    states: list[SamplingState]
    vocab_size: int
    processors: list[AppliedProcessor]
    """Processors of Stage.LOGITS."""
    groups: list[Group]
    """All rows that are not greedy."""
    logprob_rows: Rows
    """Rows with logprobs."""
    num_top_logprobs: list[int]
    """Number of top logprobs for each of `logprob_rows`."""

    @classmethod
    def build(
        cls,
        states: list[SamplingState],
        processors: Sequence[LogitsProcessor],
        vocab_size: int,
        max_group_rows: int,
        device: torch.device,
    ) -> Batch:
        """Build a batch from the states of its rows, with one transfer."""
        concerned = _concerned(states, processors)
        groups = _groups(states, concerned[Stage.PROBABILITIES], max_group_rows)
        logprob_rows = [number for number, state in enumerate(states) if state.params.logprobs is not None]
        outgoing = Outgoing()

        def plan(stage: Stage, numbers: Sequence[int]) -> list[_Planned]:
            return _plan(concerned[stage], states, numbers, vocab_size, outgoing)

        on_logits = plan(Stage.LOGITS, range(len(states)))
        on_groups = [plan(Stage.PROBABILITIES, group) for group in groups]
        indices = outgoing.add([np.array(numbers, dtype=np.int64) for numbers in (logprob_rows, *groups)])
        temperatures = outgoing.add(
            [np.array([[states[number].params.temperature] for number in group], dtype=np.float32) for group in groups]
        )
        tensors = outgoing.send(device)
        logprob_index, *group_indices = tensors[indices]

        def rows_of(numbers: list[int], index: torch.Tensor) -> Rows:
            return Rows(numbers, None if len(numbers) == len(states) else index)

        return cls(
            states,
            vocab_size,
            [item.on_device(tensors) for item in on_logits],
            [
                Group(rows_of(group, index), temperature, [item.on_device(tensors) for item in on_group])
                for group, index, temperature, on_group in zip(
                    groups, group_indices, tensors[temperatures], on_groups, strict=True
                )
            ],
            rows_of(logprob_rows, logprob_index),
            [states[number].params.logprobs or 0 for number in logprob_rows],
        )


@dataclass(frozen=True, slots=True)
class _Planned:
    """An AppliedProcessor before its inputs are on the device."""

    processor: LogitsProcessor
    rows: list[tuple[int, int]]
    inputs: slice

    def on_device(self, tensors: list[torch.Tensor]) -> AppliedProcessor:
        return AppliedProcessor(self.processor, self.rows, tensors[self.inputs])


_Concerned = dict[LogitsProcessor, list[int]]
"""Rows of the batch by processor, in the order of the processors."""


def _concerned(states: Sequence[SamplingState], processors: Sequence[LogitsProcessor]) -> dict[Stage, _Concerned]:
    rows: _Concerned = {}
    for number, state in enumerate(states):
        for processor in state.processors:
            rows.setdefault(processor, []).append(number)
    return {stage: {item: rows[item] for item in processors if item in rows and item.stage is stage} for stage in Stage}


def _groups(states: Sequence[SamplingState], filters: _Concerned, max_rows: int) -> list[list[int]]:
    """Rows that are not greedy, in groups that either all need sorted probabilities or all do not."""
    filtered = {number for numbers in filters.values() for number in numbers}
    sampled = [number for number, state in enumerate(states) if state.params.temperature > 0]
    return [
        rows[begin : begin + max_rows]
        for rows in ([n for n in sampled if n not in filtered], [n for n in sampled if n in filtered])
        for begin in range(0, len(rows), max_rows)
    ]


def _plan(
    concerned: _Concerned,
    states: Sequence[SamplingState],
    numbers: Sequence[int],
    vocab_size: int,
    outgoing: Outgoing,
) -> list[_Planned]:
    """Processors for values that have rows `numbers` of the batch."""
    row_of = {number: at for at, number in enumerate(numbers)} if concerned else {}
    planned = []
    for processor, some in concerned.items():
        rows = [(row_of[number], number) for number in some if number in row_of]
        if rows:
            params = [(at, states[number].params) for at, number in rows]
            inputs = processor.batch_inputs(params, (len(numbers), vocab_size))
            planned.append(_Planned(processor, rows, outgoing.add(inputs)))
    return planned
