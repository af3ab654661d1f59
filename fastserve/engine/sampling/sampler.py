"""The sampler: logits of a batch in, one token for each row out.

The order of the transforms is part of their meaning: bias and penalties change the logits, temperature scales them,
top-k, top-p, min-p and then typical-p cut the sorted probabilities, and one uniform number for each row picks from what
is left by inverting the cumulative distribution. Each row's result is a function of that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve.engine.contract import SamplingParams, TokenLogprob
from fastserve.engine.sampling import bias, filters, logprobs, noise, penalties, typical
from fastserve.engine.sampling.row import SamplingRow

SLICE_ENTRIES = 1 << 22
"""Of the logits that are drawn from at once."""


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Draw a token for each row of `logits` (rows, vocabulary)."""
    logits = logits.float()
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    untouched = logits[wanted] if wanted else logits
    if any(_changes_logits(row) for row in rows):
        logits = logits.clone()
        bias.apply(logits, rows)
        penalties.apply(logits, rows)
    token_ids = logits.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0 and row.params.top_k != 1]
    for plain in (True, False):
        some = [index for index in drawn if _is_unfiltered(rows[index].params) is plain]
        choose = _draw if plain else _draw_filtered
        # Sorting and cumulating keep several copies of what they work on, so that is bounded.
        size = max(1, SLICE_ENTRIES // logits.shape[1])
        for part in (some[begin : begin + size] for begin in range(0, len(some), size)):
            token_ids[part] = choose(logits[part], [rows[index] for index in part])
    found: list[TokenLogprob | None] = [None] * len(rows)
    if wanted:
        counts = [rows[index].params.logprobs or 0 for index in wanted]
        for index, item in zip(wanted, logprobs.gather(untouched, token_ids[wanted], counts), strict=True):
            found[index] = item
    return token_ids.tolist(), found


def _changes_logits(row: SamplingRow) -> bool:
    params = row.params
    return (
        bool(params.logit_bias)
        or row.position < params.min_tokens
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _is_unfiltered(params: SamplingParams) -> bool:
    return params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0 and params.typical_p >= 1.0


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)


def _probabilities(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    return (logits / _column([row.params.temperature for row in rows], logits)).softmax(dim=-1)


def _invert(probabilities: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Index for each row at which the cumulative distribution passes the row's uniform number."""
    cumulative = probabilities.double().cumsum(dim=-1)
    uniforms = [noise.uniform(row.params.seed, row.choice, row.position) for row in rows]
    target = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device).unsqueeze(1)
    index = torch.searchsorted(cumulative, target * cumulative[:, -1:], right=True).squeeze(1)
    return index.clamp_(max=probabilities.shape[1] - 1)


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    return _invert(_probabilities(logits, rows), rows)


def _draw_filtered(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    # Stable: equal logits keep the order of their ids, so the draw does not depend on the sorting algorithm.
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = _probabilities(ordered, rows)
    vocabulary = logits.shape[1]
    keep = filters.keep_mask(
        probabilities,
        _column([row.params.top_k or vocabulary for row in rows], logits),
        _column([row.params.top_p for row in rows], logits),
        _column([row.params.min_p for row in rows], logits),
    )
    if any(row.params.typical_p < 1.0 for row in rows):
        keep &= typical.keep_mask(probabilities * keep, _column([row.params.typical_p for row in rows], logits))
    index = _invert(probabilities * keep, rows)
    return ids.gather(1, index.unsqueeze(1)).squeeze(1)
