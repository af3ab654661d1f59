"""`repetition_penalty` (Keskar et al., CTRL, 2019): makes tokens of prompt and answer less likely."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.history import TokenCounts
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow
from fastserve.engine.sampling.sparse import Entries, join_entries


class RepetitionPenalty(LogitsProcessor):
    def concerns(self, params: SamplingParams) -> bool:
        return params.repetition_penalty != 1.0

    def needs_last_token(self, params: SamplingParams) -> bool:
        return True

    def start(self, params: SamplingParams) -> TokenCounts:
        return TokenCounts()

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        return join_entries(self._entries(rows))

    def _entries(self, rows: Iterable[tuple[int, SamplingRow]]) -> Iterator[Entries]:
        for at, row in rows:
            counts: TokenCounts = row.state.processors[self]
            seen, _ = counts.update(row.token_ids)
            yield at, seen, np.full(len(seen), row.params.repetition_penalty, dtype=np.float32)

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, token_ids, penalties = inputs
        logits = values[rows, token_ids]
        values[rows, token_ids] = torch.where(logits > 0, logits / penalties, logits * penalties)
