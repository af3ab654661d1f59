"""`min_p` (Nguyen et al., 2024): keeps tokens whose probability is at least min_p times that of the likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.processor import LogitsProcessor, Stage, column


class MinP(LogitsProcessor):
    stage = Stage.PROBABILITIES

    def concerns(self, params: SamplingParams) -> bool:
        return params.min_p > 0.0

    def batch_inputs(self, rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int]) -> Arrays:
        return (column(rows, shape, "min_p", off=0.0),)

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        [min_p] = inputs
        values *= values >= min_p * values[:, :1]
