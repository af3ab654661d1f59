"""What the sampler is told about one row of the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastserve.engine.contract import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    params: SamplingParams
    choice: int
    token_ids: npt.NDArray[np.int32]
    """The prompt, then the answer so far. The last one may not be known yet, where nothing depends on it (no
    penalties): then anything stands in its place."""
    num_prompt_tokens: int

    @property
    def position(self) -> int:
        """Index in the answer of the token that is to be drawn."""
        return len(self.token_ids) - self.num_prompt_tokens
