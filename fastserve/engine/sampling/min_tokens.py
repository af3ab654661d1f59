"""`min_tokens`: masks stop tokens until the answer has min_tokens tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow
from fastserve.engine.sampling.sparse import join_entries


class MinTokens(LogitsProcessor):
    def concerns(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0 and bool(params.stop_token_ids)

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        return join_entries(
            (at, row.params.stop_token_ids, [-torch.inf] * len(row.params.stop_token_ids))
            for at, row in rows
            if row.position < row.params.min_tokens
        )

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, token_ids, infinities = inputs
        values[rows, token_ids] = infinities
