"""The rows of a batch: which of them each processor concerns, and their parameters on the device.

A batch seldom changes from one step to the next, so all of this stays. It knows no processor by name.
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
    """Arrays that are collected to go to a device in one transfer."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []

    def add(self, arrays: Arrays) -> slice:
        """Where they will be among the tensors of `send`."""
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
    """The same on the device; None: all rows of the batch, in order."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor (rows of the batch, ...)."""
        return tensor if self.index is None else tensor[self.index]


@dataclass(frozen=True, slots=True)
class AppliedProcessor:
    """A processor and the rows that it concerns."""

    processor: LogitsProcessor
    rows: list[tuple[int, int]]
    """(row of the values that it changes, row of the batch)"""
    batch_inputs: list[torch.Tensor]

    def step_inputs(self, rows: Sequence[SamplingRow], vocab_size: int) -> Arrays | None:
        """`rows` of the batch in this step."""
        return self.processor.step_inputs(((at, rows[number]) for at, number in self.rows), vocab_size)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are sampled at once."""

    rows: Rows
    temperature: torch.Tensor
    """(rows, 1)"""
    processors: list[AppliedProcessor]
    """In the stage of probabilities. None: there is no need to sort them."""


@dataclass(frozen=True, slots=True)
class Batch:
    states: list[SamplingState]
    vocab_size: int
    processors: list[AppliedProcessor]
    """In the stage of logits."""
    groups: list[Group]
    """All rows that are not greedy."""
    logprob_rows: Rows
    """Rows that want logprobs,"""
    num_top_logprobs: list[int]
    """and those of how many likeliest tokens each."""

    @classmethod
    def build(
        cls,
        states: list[SamplingState],
        processors: Sequence[LogitsProcessor],
        vocab_size: int,
        max_group_rows: int,
        device: torch.device,
    ) -> Batch:
        """`states` of each row of the batch. One transfer."""
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
    """An AppliedProcessor whose inputs are not on the device yet."""

    processor: LogitsProcessor
    rows: list[tuple[int, int]]
    inputs: slice

    def on_device(self, tensors: list[torch.Tensor]) -> AppliedProcessor:
        return AppliedProcessor(self.processor, self.rows, tensors[self.inputs])


_Concerned = dict[LogitsProcessor, list[int]]
"""Rows of the batch that each processor concerns, in the order of the processors."""


def _concerned(states: Sequence[SamplingState], processors: Sequence[LogitsProcessor]) -> dict[Stage, _Concerned]:
    rows: _Concerned = {}
    for number, state in enumerate(states):
        for processor in state.processors:
            rows.setdefault(processor, []).append(number)
    return {stage: {item: rows[item] for item in processors if item in rows and item.stage is stage} for stage in Stage}


def _groups(states: Sequence[SamplingState], filters: _Concerned, max_rows: int) -> list[list[int]]:
    """Rows that are not greedy, those whose probabilities are sorted apart from the others."""
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
    """Processors for values whose rows are these rows of the batch."""
    places = {number: at for at, number in enumerate(numbers)} if concerned else {}
    planned = []
    for processor, some in concerned.items():
        rows = [(places[number], number) for number in some if number in places]
        if rows:
            params = [(at, states[number].params) for at, number in rows]
            inputs = processor.batch_inputs(params, (len(numbers), vocab_size))
            planned.append(_Planned(processor, rows, outgoing.add(inputs)))
    return planned
