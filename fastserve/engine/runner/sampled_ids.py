"""The ids that the last step sampled, on the device, where the next step reads them before the host has them."""

from __future__ import annotations

import torch


class SampledIds:
    def __init__(self, max_rows: int, device: torch.device) -> None:
        """`max_rows`: maximum number of ids sampled in a step."""
        self._ids = torch.zeros(max_rows, dtype=torch.int64, device=device)

    @staticmethod
    def placeholder(index: int) -> int:
        """Input id that stands for the id at `index` among those sampled last."""
        return -1 - index

    def keep(self, token_ids: torch.Tensor) -> None:
        """Replace the ids by those of a new step, (rows,)."""
        self._ids[: len(token_ids)].copy_(token_ids)

    def fill_in(self, input_ids: torch.Tensor) -> None:
        """Replace placeholders by the sampled ids, in place. Can be recorded."""
        # Known ids look up index 0, and the result is not used.
        sampled = self._ids[(-1 - input_ids).clamp_(min=0)]
        input_ids.copy_(torch.where(input_ids < 0, sampled, input_ids))
