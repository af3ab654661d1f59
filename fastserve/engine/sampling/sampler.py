"""The sampler: logits of a batch in, one token for each row out.

The order of the transforms is part of their meaning: bias and penalties change the logits, temperature scales them,
top-k, top-p, min-p and then typical-p cut the sorted probabilities, and one uniform number for each row picks from what
is left by inverting the cumulative distribution. Each row's result is a function of that row alone.

Nothing here waits for the device: what a step needs goes there behind the work before it, and what it brought is read
later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.contract import TokenLogprob
from fastserve.engine.devices.find import device_of
from fastserve.engine.sampling import bias, filters, logprobs, noise, penalties, typical
from fastserve.engine.sampling.batch import Batch, Group
from fastserve.engine.sampling.entries import Entries
from fastserve.engine.sampling.row import SamplingRow
from fastserve.engine.transfers import Readback, to_device

SLICE_ENTRIES = 1 << 22
"""Of the logits that are drawn from at once: sorting and cumulating keep several copies of what they work on."""
_CHANGES = (
    (bias.find, bias.apply),
    (penalties.find_repeated, penalties.apply_repeated),
    (penalties.find_counted, penalties.apply_counted),
)


@dataclass(frozen=True, slots=True)
class Draw:
    """What a draw brings. `result` is to be called after the readback's `wait`."""

    token_ids: torch.Tensor
    """(rows,) int64, on the device"""
    on_host: torch.Tensor
    telling: Sequence[int]
    logprobs: logprobs.Logprobs | None

    def result(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """For each row the token, and its logprobs where they are wanted."""
        told: list[TokenLogprob | None] = [None] * len(self.on_host)
        if self.logprobs is not None:
            for row, item in zip(self.telling, self.logprobs.told(), strict=True):
                told[row] = item
        return self.on_host.tolist(), told


class Sampler:
    def __init__(self) -> None:
        self._batch: Batch | None = None

    def draw(self, logits: torch.Tensor, rows: Sequence[SamplingRow], readback: Readback) -> Draw:
        """Draw a token for each row of `logits` (rows, vocabulary), which stay as they are."""
        batch = self._batch_of(logits, rows)
        untouched = logits.float()
        logits = _changed(untouched, [(index, rows[index]) for index in batch.changing])
        token_ids = logits.argmax(dim=-1)
        uniforms = [_uniforms(group, rows) for group in batch.groups]
        for group, numbers in zip(batch.groups, to_device(uniforms, _where_to_invert(logits.device)), strict=True):
            choose = _draw_filtered if group.is_filtered else _draw
            chosen = choose(group.rows.of(logits), group, numbers)
            if group.rows.index is None:
                token_ids = chosen
            else:
                token_ids[group.rows.index] = chosen
        told = None
        if batch.counts:
            telling = batch.telling
            told = logprobs.gather(telling.of(untouched), telling.of(token_ids), batch.counts, readback)
        return Draw(token_ids, readback.take(token_ids), batch.telling.numbers, told)

    def _batch_of(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Batch:
        params = [row.params for row in rows]
        vocabulary = logits.shape[1]
        if self._batch is None or self._batch.params != params or self._batch.vocabulary != vocabulary:
            self._batch = Batch.of(params, vocabulary, max(1, SLICE_ENTRIES // vocabulary), logits.device)
        return self._batch


def _changed(logits: torch.Tensor, rows: Sequence[tuple[int, SamplingRow]]) -> torch.Tensor:
    """The logits after bias, bans and penalties of some (row of the batch, row) pairs: others, or the same."""
    arrays = [array for find, _ in _CHANGES for array in find(rows)] if rows else []
    if not any(len(array) for array in arrays):
        return logits
    logits = logits.clone()
    on_device = to_device(arrays, logits.device)
    for index, (_, apply) in enumerate(_CHANGES):
        entries = Entries(*on_device[3 * index : 3 * index + 3])
        if len(entries.rows):
            apply(logits, entries)
    return logits


def _uniforms(group: Group, rows: Sequence[SamplingRow]) -> npt.NDArray[np.float64]:
    """(rows, 1)"""
    some = [rows[index] for index in group.rows.numbers]
    return np.array([[noise.uniform(row.params.seed, row.choice, row.position)] for row in some])


def _where_to_invert(device: torch.device) -> torch.device:
    """The device itself, or the CPU where the device has no float64."""
    return device if device_of(device).has_float64 else torch.device("cpu")


def _invert(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Index for each row at which the cumulative distribution passes the row's uniform number."""
    cumulative = probabilities.to(uniforms.device).double().cumsum(dim=-1)
    index = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).squeeze(1)
    return index.clamp_(max=probabilities.shape[1] - 1).to(probabilities.device)


def _draw(logits: torch.Tensor, group: Group, uniforms: torch.Tensor) -> torch.Tensor:
    return _invert((logits / group.temperature).softmax(dim=-1), uniforms)


def _draw_filtered(logits: torch.Tensor, group: Group, uniforms: torch.Tensor) -> torch.Tensor:
    # Stable: equal logits keep the order of their ids, so the draw does not depend on the sorting algorithm.
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = (ordered / group.temperature).softmax(dim=-1)
    keep = filters.keep_mask(probabilities, group.top_k, group.top_p, group.min_p)
    if group.has_typical:
        keep &= typical.keep_mask(probabilities * keep, group.typical_p)
    index = _invert(probabilities * keep, uniforms)
    return ids.gather(1, index.unsqueeze(1)).squeeze(1)
