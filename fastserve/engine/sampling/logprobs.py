"""Log probabilities of the sampled token and of the likeliest ones, from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastserve.engine.contract import TokenLogprob
from fastserve.engine.transfers import Readback


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs of some rows, in order, in transfer to the host."""

    token_ids: torch.Tensor
    of_tokens: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor
    num_top: Sequence[int]

    def to_list(self) -> list[TokenLogprob]:
        """Must be called after the readback's `wait`."""
        return [
            TokenLogprob(token_id, logprob, list(zip(row_ids[:count], row_values[:count], strict=True)))
            for token_id, logprob, row_ids, row_values, count in zip(
                self.token_ids.tolist(),
                self.of_tokens.tolist(),
                self.top_ids.tolist(),
                self.top.tolist(),
                self.num_top,
                strict=True,
            )
        ]


def gather(logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int], readback: Readback) -> Logprobs:
    """For each row of `logits` (rows, vocabulary), the logprobs of its token and of its `num_top` likeliest tokens."""
    logprobs = logits.log_softmax(dim=-1)
    of_tokens = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    values, ids = logprobs.topk(min(max(1, max(num_top)), logits.shape[1]), dim=-1)
    return Logprobs(
        readback.take(token_ids), readback.take(of_tokens), readback.take(ids), readback.take(values), list(num_top)
    )
