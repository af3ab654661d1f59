"""`typical_p`, locally typical sampling (Meister et al., 2022): keeps tokens whose surprisal is nearest to the entropy.

Unlike the other filters it may remove the likeliest token, when its surprisal is far below the average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.processor import LogitsProcessor, Stage, column


class TypicalP(LogitsProcessor):
    stage = Stage.PROBABILITIES

    def concerns(self, params: SamplingParams) -> bool:
        return params.typical_p < 1.0

    def batch_inputs(self, rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int]) -> Arrays:
        return (column(rows, shape, "typical_p", off=1.0),)

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        [typical_p] = inputs
        values *= keep_mask(values, typical_p)


def keep_mask(probabilities: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """Mask of the entries to keep. `probabilities` (rows, vocabulary) are 0 for removed tokens; `typical_p` (rows, 1).

    Keeps the fewest tokens, nearest first, whose renormalised probabilities reach `typical_p`, and tokens as near as
    the last of them. 1 keeps all.
    """
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    surprise = -probabilities.log()
    entropy = torch.where(probabilities > 0, probabilities * surprise, 0.0).sum(dim=-1, keepdim=True)
    distance = (surprise - entropy).abs()
    nearest, order = distance.sort(dim=-1)
    reached = probabilities.gather(1, order).cumsum(dim=-1)
    last = (reached < typical_p).sum(dim=-1, keepdim=True).clamp_(max=probabilities.shape[1] - 1)
    return (distance <= nearest.gather(1, last)) | (typical_p >= 1.0)
