"""`logit_bias`: numbers that a request adds to the logits of given tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.processor import LogitsProcessor
from fastserve.engine.sampling.sparse import join_entries


class LogitBias(LogitsProcessor):
    def concerns(self, params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    def batch_inputs(self, rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int]) -> Arrays:
        biases = ((row, params.logit_bias) for row, params in rows)
        return join_entries((row, list(bias), list(bias.values())) for row, bias in biases) or ()

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, token_ids, biases = inputs
        values[rows, token_ids] += biases
