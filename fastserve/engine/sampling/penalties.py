"""Repetition penalty (Keskar et al., CTRL, 2019; over prompt and answer), presence and frequency penalties (OpenAI's;
over the answer). All are functions of the tokens so far: nothing is kept between steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastserve.engine.sampling.row import SamplingRow


def apply(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Change `logits` (rows, vocabulary) in place."""
    for index, row in enumerate(rows):
        params = row.params
        if params.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(row.token_ids)).long().to(logits.device)
            values = logits[index, seen]
            scaled = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            logits[index, seen] = scaled
        if params.presence_penalty or params.frequency_penalty:
            ids, counts = np.unique(row.token_ids[row.num_prompt_tokens :], return_counts=True)
            fall = params.presence_penalty + params.frequency_penalty * counts.astype(np.float32)
            logits[index, torch.from_numpy(ids).long().to(logits.device)] -= torch.from_numpy(
                fall.astype(np.float32)
            ).to(logits.device)
