"""`presence_penalty` and `frequency_penalty` (OpenAI's): subtracted from the logits of tokens in the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.history import TokenCounts
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow
from fastserve.engine.sampling.sparse import Entries, join_entries


class OutputPenalties(LogitsProcessor):
    def concerns(self, params: SamplingParams) -> bool:
        return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    def needs_last_token(self, params: SamplingParams) -> bool:
        return True

    def start(self, params: SamplingParams) -> TokenCounts:
        return TokenCounts()

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        return join_entries(self._entries(rows))

    def _entries(self, rows: Iterable[tuple[int, SamplingRow]]) -> Iterator[Entries]:
        for at, row in rows:
            params = row.params
            counter: TokenCounts = row.state.processors[self]
            token_ids, counts = counter.update(row.token_ids[row.state.num_prompt_tokens :])
            yield at, token_ids, params.presence_penalty + params.frequency_penalty * counts.astype(np.float32)

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, token_ids, penalties = inputs
        values[rows, token_ids] -= penalties
