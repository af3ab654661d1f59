"""`top_p` (nucleus sampling: Holtzman et al., 2020): keeps the fewest likeliest tokens whose probabilities reach top_p.

top_p is a share of the probability that earlier processors left. The token that crosses the limit is kept too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.processor import LogitsProcessor, Stage, column


class TopP(LogitsProcessor):
    stage = Stage.PROBABILITIES

    def concerns(self, params: SamplingParams) -> bool:
        return params.top_p < 1.0

    def batch_inputs(self, rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int]) -> Arrays:
        return (column(rows, shape, "top_p", off=1.0),)

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        [top_p] = inputs
        before = values.cumsum(dim=-1) - values
        # By rounding, the sum before the last tokens may reach 1: rows without top_p keep them.
        keep = (before < top_p * values.sum(dim=-1, keepdim=True)) | (top_p >= 1.0)
        keep[:, 0] = True
        values *= keep
