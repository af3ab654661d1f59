"""The contract of logits processors: what a sampling parameter does to the logits of the requests that set it.

A processor is one object for all batches and keeps nothing of a batch. What it needs to know about one sequence beyond
its tokens (counts of tokens, the state of a grammar) is the object that `start` returns, which lives as long as the
runner holds the sequence. After preemption the sequence comes back with its tokens and starts anew; with speculation a
step has several rows of it, one for each draft, and the tokens of wrong drafts are gone in the next step. So a state is
a cache of something that follows from `row.token_ids` (see history.py).

Arrays that `batch_inputs` and `step_inputs` return are copied to the device together with those of all other
processors, in one transfer each. Nothing here may wait for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays


class Stage(Enum):
    LOGITS = "logits"
    """The logits of all rows, greedy ones too: (rows, vocabulary) in float32."""
    PROBABILITIES = "probabilities"
    """After the temperature, for rows that are not greedy: probabilities (rows, vocabulary) in float32, each row in
    descending order. Those of tokens that are cut become 0; they are not renormalised. Each row keeps one at least."""


@dataclass(frozen=True, slots=True, eq=False)
class SamplingState:
    """A sequence as the sampler knows it, for as long as the runner holds it (see `Sampler.start`)."""

    params: SamplingParams
    num_prompt_tokens: int
    noise_key: int
    processors: dict[LogitsProcessor, Any]
    """Those that concern it, in the order in which they are applied, each with its state for this sequence."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    state: SamplingState
    token_ids: npt.NDArray[np.int32]
    """Prompt, answer so far, and drafts that are taken to be right. The last one may be anything as long as it is not
    known, unless a processor needs it."""

    @property
    def params(self) -> SamplingParams:
        return self.state.params

    @property
    def position(self) -> int:
        """Index in the answer of the token that is sampled."""
        return len(self.token_ids) - self.state.num_prompt_tokens


class LogitsProcessor(ABC):
    stage: ClassVar[Stage] = Stage.LOGITS

    @abstractmethod
    def concerns(self, params: SamplingParams) -> bool:
        """Whether it has any effect on a request with these parameters. Rows of other requests keep their values."""

    def needs_last_token(self, params: SamplingParams) -> bool:
        """Whether it reads the last token of a request that it concerns. If so, a step of the request cannot be planned
        while the step that samples this token is in flight. If not, `row.token_ids[-1]` may be anything."""
        return False

    def start(self, params: SamplingParams) -> Any:
        """State for a sequence that it concerns, as `row.state.processors[self]`."""
        return None

    def batch_inputs(self, rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int]) -> Arrays:
        """Arrays for `apply` that depend on parameters only; they stay on the device while the batch is the same.

        `rows` are (row of the values, parameters) of the requests that it concerns, one at least; `shape` is that of
        the values, (rows, vocabulary).
        """
        return ()

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        """Arrays for `apply` that depend on tokens or position; None: nothing is to be applied in this step.

        `rows` are as in `batch_inputs`. Rows of one sequence come in the order of their lengths.
        """
        return ()

    @abstractmethod
    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        """Change the values (see `stage`) in place. `inputs` are the arrays of both methods above, on the device."""


def column(
    rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int], name: str, off: float
) -> npt.NDArray[np.float32]:
    """(rows, 1): a parameter by its name for the rows concerned, and the value that switches it off for the others."""
    values = np.full((shape[0], 1), off, dtype=np.float32)
    for row, params in rows:
        values[row, 0] = getattr(params, name)
    return values
