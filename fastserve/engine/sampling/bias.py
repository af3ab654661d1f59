"""Logit bias, and the ban on stop tokens before `min_tokens`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.sampling.row import SamplingRow


def apply(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Change `logits` (rows, vocabulary) in place. Token ids beyond the vocabulary were refused at the door."""
    for index, row in enumerate(rows):
        params = row.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[index, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if params.stop_token_ids and row.position < params.min_tokens:
            logits[index, list(params.stop_token_ids)] = float("-inf")
