"""Log probabilities of the drawn token and of the likeliest ones, of the model itself: before penalties and filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastserve.engine.contract import TokenLogprob
from fastserve.engine.transfers import Readback


@dataclass(frozen=True, slots=True)
class Logprobs:
    """On their way to the host: of some rows, in order."""

    token_ids: torch.Tensor
    drawn: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor
    counts: Sequence[int]

    def told(self) -> list[TokenLogprob]:
        """To be called after the readback's `wait`."""
        return [
            TokenLogprob(token_id, logprob, list(zip(row_ids[:count], row_values[:count], strict=True)))
            for token_id, logprob, row_ids, row_values, count in zip(
                self.token_ids.tolist(),
                self.drawn.tolist(),
                self.top_ids.tolist(),
                self.top.tolist(),
                self.counts,
                strict=True,
            )
        ]


def gather(logits: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int], readback: Readback) -> Logprobs:
    """`logits` (rows, vocabulary), `token_ids` (rows) as drawn, `counts` how many likeliest tokens each row wants."""
    logprobs = logits.log_softmax(dim=-1)
    drawn = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    values, ids = logprobs.topk(max(1, max(counts)), dim=-1)
    return Logprobs(
        readback.take(token_ids), readback.take(drawn), readback.take(ids), readback.take(values), list(counts)
    )
