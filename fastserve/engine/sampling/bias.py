"""Logit bias, and the ban on stop tokens before `min_tokens`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.sampling.entries import Columns, Entries, columns
from fastserve.engine.sampling.row import SamplingRow


def concerns(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or (params.min_tokens > 0 and bool(params.stop_token_ids))


def find(rows: Sequence[tuple[int, SamplingRow]]) -> Columns:
    """What is added to the logits, for (row of the batch, row) pairs."""
    return columns(_of_each(rows))


def _of_each(rows: Sequence[tuple[int, SamplingRow]]) -> Iterator[tuple[int, list[int], list[float]]]:
    for index, row in rows:
        params = row.params
        added = dict(params.logit_bias)
        if row.position < params.min_tokens:
            added |= dict.fromkeys(params.stop_token_ids, float("-inf"))
        yield index, list(added), list(added.values())


def apply(logits: torch.Tensor, entries: Entries) -> None:
    """Change `logits` (rows, vocabulary) in place. Token ids beyond the vocabulary were refused at the door."""
    logits[entries.at] += entries.numbers
