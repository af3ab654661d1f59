"""Repetition penalty (Keskar et al., CTRL, 2019; over prompt and answer), presence and frequency penalties (OpenAI's;
over the answer). All are functions of the tokens so far: nothing is kept between steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.sampling.entries import Columns, Entries, columns
from fastserve.engine.sampling.row import SamplingRow

_Part = tuple[int, npt.NDArray[np.int32], npt.NDArray[np.float32]]


def find_repeated(rows: Sequence[tuple[int, SamplingRow]]) -> Columns:
    """The repetition penalty of each token seen, for (row of the batch, row) pairs."""
    return columns(_repeated(rows))


def _repeated(rows: Sequence[tuple[int, SamplingRow]]) -> Iterator[_Part]:
    for index, row in rows:
        penalty = row.params.repetition_penalty
        if penalty != 1.0:
            seen = np.unique(row.token_ids)
            yield index, seen, np.full(len(seen), penalty, dtype=np.float32)


def apply_repeated(logits: torch.Tensor, entries: Entries) -> None:
    """Change `logits` (rows, vocabulary) in place."""
    values = logits[entries.at]
    logits[entries.at] = torch.where(values > 0, values / entries.numbers, values * entries.numbers)


def find_counted(rows: Sequence[tuple[int, SamplingRow]]) -> Columns:
    """What presence and frequency penalties take from each token of the answer."""
    return columns(_counted(rows))


def _counted(rows: Sequence[tuple[int, SamplingRow]]) -> Iterator[_Part]:
    for index, row in rows:
        params = row.params
        if params.presence_penalty or params.frequency_penalty:
            ids, counts = np.unique(row.token_ids[row.num_prompt_tokens :], return_counts=True)
            yield index, ids, params.presence_penalty + params.frequency_penalty * counts.astype(np.float32)


def apply_counted(logits: torch.Tensor, entries: Entries) -> None:
    """Change `logits` (rows, vocabulary) in place."""
    logits[entries.at] -= entries.numbers
