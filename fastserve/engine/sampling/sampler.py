"""The sampler: samples one token for each row of a batch of logits.

Logits processors change the logits; the temperature scales them; further processors (top-k, top-p, ...) filter the
sorted probabilities; one uniform number for each row selects a token by inverting the cumulative distribution. Rows of
temperature 0 take the likeliest token after the first stage. Each row's result is a function of that row alone.

Nothing here waits for the device: inputs are queued after earlier work, and results are read later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastserve.engine.contract import SamplingParams, TokenLogprob
from fastserve.engine.devices.find import device_of
from fastserve.engine.sampling import logprobs, noise
from fastserve.engine.sampling.batch import AppliedProcessor, Batch, Group, Outgoing
from fastserve.engine.sampling.order import LOGITS_PROCESSORS
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow, SamplingState
from fastserve.engine.transfers import Readback, to_device

SLICE_ENTRIES = 1 << 22
"""Maximum entries of logits that are sampled at once, because sorting takes several copies of them."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Tokens sampled in a step. `result` must be called after the readback's `wait`."""

    token_ids: torch.Tensor
    """(rows,) int64, on the device"""
    on_host: torch.Tensor
    logprob_rows: Sequence[int]
    logprobs: logprobs.Logprobs | None

    def result(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """For each row the token, and its logprobs where requested."""
        found: list[TokenLogprob | None] = [None] * len(self.on_host)
        if self.logprobs is not None:
            for row, item in zip(self.logprob_rows, self.logprobs.to_list(), strict=True):
                found[row] = item
        return self.on_host.tolist(), found


class Sampler:
    def __init__(self, processors: Sequence[LogitsProcessor] = LOGITS_PROCESSORS) -> None:
        """`processors` are applied in their order."""
        self._processors = tuple(processors)
        self._batch: Batch | None = None

    def start(self, params: SamplingParams, choice: int, num_prompt_tokens: int) -> SamplingState:
        """State of a sequence, shared by all its rows, for as long as the runner holds it."""
        concerned = [processor for processor in self._processors if processor.concerns(params)]
        processors = {processor: processor.start(params) for processor in concerned}
        return SamplingState(params, num_prompt_tokens, noise.key(params.seed, choice), processors)

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow], readback: Readback) -> SampledTokens:
        """Sample a token for each row of `logits` (rows, vocabulary), which are not changed."""
        batch = self._batch_of(logits, rows)
        inputs = _step_inputs(batch, rows, logits.device)
        original = logits.float()
        changed = original
        if inputs.on_logits:
            changed = original.clone()
            _apply(changed, inputs.on_logits)
        token_ids = changed.argmax(dim=-1)
        for group, on_group, uniforms in zip(batch.groups, inputs.on_groups, inputs.uniforms, strict=True):
            sampled = _sample(group.rows.of(changed), group, on_group, uniforms)
            if group.rows.index is None:
                token_ids = sampled
            else:
                token_ids[group.rows.index] = sampled
        found = None
        if batch.num_top_logprobs:
            some = batch.logprob_rows
            found = logprobs.gather(some.of(original), some.of(token_ids), batch.num_top_logprobs, readback)
        return SampledTokens(token_ids, readback.take(token_ids), batch.logprob_rows.numbers, found)

    def _batch_of(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Batch:
        states = [row.state for row in rows]
        vocab_size = logits.shape[1]
        if self._batch is None or self._batch.states != states or self._batch.vocab_size != vocab_size:
            max_group_rows = max(1, SLICE_ENTRIES // vocab_size)
            self._batch = Batch.build(states, self._processors, vocab_size, max_group_rows, logits.device)
        return self._batch


_Inputs = list[tuple[LogitsProcessor, list[torch.Tensor]]]
"""Processors of a step with their inputs."""


@dataclass(frozen=True, slots=True)
class _StepInputs:
    """Inputs on the device; the two lists have one item for each group of the batch. `uniforms`: (rows, 1) each."""

    on_logits: _Inputs
    on_groups: list[_Inputs]
    uniforms: list[torch.Tensor]


def _step_inputs(batch: Batch, rows: Sequence[SamplingRow], device: torch.device) -> _StepInputs:
    """Prepare the inputs of a step, with one transfer."""
    if not batch.processors and not batch.groups:
        return _StepInputs([], [], [])
    outgoing = Outgoing()

    def prepare(processors: list[AppliedProcessor]) -> list[tuple[AppliedProcessor, slice]]:
        arrays = [(item, item.step_inputs(rows, batch.vocab_size)) for item in processors]
        return [(item, outgoing.add(some)) for item, some in arrays if some is not None]

    on_logits, on_groups = prepare(batch.processors), [prepare(group.processors) for group in batch.groups]
    uniforms = [_uniforms([rows[number] for number in group.rows.numbers]) for group in batch.groups]
    if device_of(device).has_float64:
        numbers = outgoing.add(uniforms)
        tensors = outgoing.send(device)
        uniforms_there = tensors[numbers]
    else:  # the CPU inverts the distribution
        tensors, uniforms_there = outgoing.send(device), to_device(uniforms, torch.device("cpu"))

    def joined(prepared: list[tuple[AppliedProcessor, slice]]) -> _Inputs:
        return [(item.processor, item.batch_inputs + tensors[where]) for item, where in prepared]

    return _StepInputs(joined(on_logits), [joined(item) for item in on_groups], uniforms_there)


def _apply(values: torch.Tensor, processors: _Inputs) -> None:
    for processor, inputs in processors:
        processor.apply(values, inputs)


def _sample(logits: torch.Tensor, group: Group, processors: _Inputs, uniforms: torch.Tensor) -> torch.Tensor:
    if not group.processors:
        return _invert((logits / group.temperature).softmax(dim=-1), uniforms)
    # Stable: equal logits keep the order of their ids, so the token does not depend on the sorting algorithm.
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = (ordered / group.temperature).softmax(dim=-1)
    _apply(probabilities, processors)
    index = _invert(probabilities, uniforms)
    return ids.gather(1, index.unsqueeze(1)).squeeze(1)


def _uniforms(rows: Sequence[SamplingRow]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(rows, 1)"""
    return np.array([[noise.uniform(row.state.noise_key, row.position)] for row in rows])


def _invert(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Index for each row at which the cumulative distribution exceeds the row's uniform number."""
    cumulative = probabilities.to(uniforms.device).double().cumsum(dim=-1)
    index = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).squeeze(1)
    return index.clamp_(max=probabilities.shape[1] - 1).to(probabilities.device)
