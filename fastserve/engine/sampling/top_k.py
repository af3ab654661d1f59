"""`top_k`: keeps the k likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.processor import LogitsProcessor, Stage, column


class TopK(LogitsProcessor):
    stage = Stage.PROBABILITIES

    def concerns(self, params: SamplingParams) -> bool:
        return params.top_k > 0

    def batch_inputs(self, rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int]) -> Arrays:
        return (column(rows, shape, "top_k", off=shape[1]),)

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        [top_k] = inputs
        values *= torch.arange(values.shape[1], device=values.device) < top_k
