"""`bad_token_ids`: sequences of tokens that the answer does not contain. The last token of each becomes as good as
impossible where the answer ends in the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.allowed_tokens import AS_GOOD_AS_NEVER
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow
from fastserve.engine.sampling.sparse import join_entries


class BadWords(LogitsProcessor):
    def concerns(self, params: SamplingParams) -> bool:
        return bool(params.bad_token_ids)

    def needs_last_token(self, params: SamplingParams) -> bool:
        return any(len(token_ids) > 1 for token_ids in params.bad_token_ids)

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        return join_entries(
            (at, ids, [AS_GOOD_AS_NEVER] * len(ids)) for at, ids in ((at, _next(row)) for at, row in rows)
        )

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, token_ids, changes = inputs
        values[rows, token_ids] += changes


def _next(row: SamplingRow) -> list[int]:
    """Tokens that would complete a sequence, each once."""
    found: dict[int, None] = {}
    for *before, last in row.params.bad_token_ids:
        if not before or (row.position >= len(before) and row.token_ids[-len(before) :].tolist() == before):
            found[last] = None
    return list(found)
