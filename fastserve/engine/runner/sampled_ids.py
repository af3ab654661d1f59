"""The ids that the last step drew, on the device, where the next one can take them up before the host has them."""

from __future__ import annotations

import torch


class SampledIds:
    def __init__(self, most: int, device: torch.device) -> None:
        """`most` of one step."""
        self._ids = torch.zeros(most, dtype=torch.int64, device=device)

    @staticmethod
    def stand_in(index: int) -> int:
        """What stands among input ids for the id at `index` of those drawn last."""
        return -1 - index

    def keep(self, token_ids: torch.Tensor) -> None:
        """(rows,) in place of those of the step before."""
        self._ids[: len(token_ids)].copy_(token_ids)

    def fill_in(self, input_ids: torch.Tensor) -> None:
        """Put drawn ids where their stand-ins are, in place. Can be recorded."""
        # Of ids that are known, the first one drawn is looked up and not used.
        drawn = self._ids[(-1 - input_ids).clamp_(min=0)]
        input_ids.copy_(torch.where(input_ids < 0, drawn, input_ids))
