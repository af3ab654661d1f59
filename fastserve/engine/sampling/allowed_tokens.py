"""`allowed_token_ids`: all other tokens become as good as impossible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.processor import LogitsProcessor

AS_GOOD_AS_NEVER = -1e9
"""Added to a logit, its probability is 0 beside any other token. Unlike -inf it leaves an order among tokens where no
others are left, as when the end of the answer is the only token allowed and min_tokens forbids it."""


class AllowedTokens(LogitsProcessor):
    def concerns(self, params: SamplingParams) -> bool:
        return bool(params.allowed_token_ids)

    def batch_inputs(self, rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int]) -> Arrays:
        lengths = [len(params.allowed_token_ids) for _, params in rows]
        return (
            np.array([row for row, _ in rows]),
            np.repeat(np.arange(len(rows)), lengths),
            np.concatenate([np.array(params.allowed_token_ids, dtype=np.int64) for _, params in rows]),
        )

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, at, token_ids = inputs
        change = values.new_full((len(rows), values.shape[1]), AS_GOOD_AS_NEVER)
        change[at, token_ids] = 0
        values[rows] += change
