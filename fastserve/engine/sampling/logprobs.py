"""Log probabilities of the drawn token and of the likeliest ones, of the model itself: before penalties and filters."""

from __future__ import annotations

import torch

from fastserve.engine.contract import TokenLogprob


def gather(logits: torch.Tensor, token_ids: torch.Tensor, counts: list[int]) -> list[TokenLogprob]:
    """`logits` (rows, vocabulary), `token_ids` (rows) as drawn, `counts` how many likeliest tokens each row wants."""
    logprobs = logits.log_softmax(dim=-1)
    drawn = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs.topk(max(1, max(counts)), dim=-1)
    return [
        TokenLogprob(token_id, logprob, list(zip(row_ids[:count], row_values[:count], strict=True)))
        for token_id, logprob, row_ids, row_values, count in zip(
            token_ids.tolist(), drawn, ids.tolist(), values.tolist(), counts, strict=True
        )
    ]
