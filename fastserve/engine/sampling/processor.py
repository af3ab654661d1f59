"""The contract of logits processors, which apply sampling parameters to the logits of the requests that set them.

A processor is one object for all batches and has no state of a batch. Its state for one sequence (token counts, a
grammar's state) is the object that `start` returns, which lives as long as the runner holds the sequence. A preempted
sequence starts anew with its tokens; with speculation a step has one more row of it for each draft, and the tokens of
rejected drafts are gone in the next step. So the state must be a function of `row.token_ids` (see history.py).

Arrays that `batch_inputs` and `step_inputs` return are copied to the device together with those of all other
processors, in one transfer for each of the two. Nothing here may wait for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays


class Stage(Enum):
    LOGITS = "logits"
    """Logits of all rows, greedy ones included: (rows, vocabulary) in float32."""
    PROBABILITIES = "probabilities"
    """After the temperature, for rows that are not greedy: probabilities (rows, vocabulary) in float32, each row in
    descending order. Set those of removed tokens to 0 without renormalising; keep at least one in each row."""


@dataclass(frozen=True, slots=True, eq=False)
class SamplingState:
    """The sampler's state of one sequence, for as long as the runner holds it (see `Sampler.start`)."""

    params: SamplingParams
    num_prompt_tokens: int
    noise_key: int
    processors: dict[LogitsProcessor, Any]
    """Its processors in the order in which they are applied, each with its state for this sequence."""
    failures: list[str] = field(default_factory=list)
    """Sentences that processors append: why the sequence cannot go on. It ends with the first of them."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    state: SamplingState
    token_ids: npt.NDArray[np.int32]
    """Prompt, answer so far, and drafts assumed to be accepted. The last id may be undefined, unless a processor needs
    it."""

    @property
    def params(self) -> SamplingParams:
        return self.state.params

    @property
    def position(self) -> int:
        """Index in the answer of the token to sample."""
        return len(self.token_ids) - self.state.num_prompt_tokens


class LogitsProcessor(ABC):
    stage: ClassVar[Stage] = Stage.LOGITS

    @abstractmethod
    def concerns(self, params: SamplingParams) -> bool:
        """Whether it applies to requests with these parameters. It must not change rows of other requests."""

    def needs_last_token(self, params: SamplingParams) -> bool:
        """Whether it reads the last token of such a request. If so, a step of the request cannot be planned while the
        step that samples this token is in flight. If not, `row.token_ids[-1]` may be undefined."""
        return False

    def start(self, params: SamplingParams) -> Any:
        """Initial state for a sequence, available as `row.state.processors[self]`."""
        return None

    def batch_inputs(self, rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int]) -> Arrays:
        """Arrays for `apply` that depend on parameters only; they stay on the device while the batch is unchanged.

        `rows`: (row of the values, parameters) of the requests that it applies to, at least one. `shape`: shape of the
        values, (rows, vocabulary).
        """
        return ()

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        """Arrays for `apply` that depend on tokens or position; None: do not apply it in this step.

        `rows` as in `batch_inputs`. Rows of one sequence are in the order of their lengths.
        """
        return ()

    @abstractmethod
    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        """Change the values (see `stage`) in place. `inputs`: the arrays of both methods above, on the device."""


def column(
    rows: Sequence[tuple[int, SamplingParams]], shape: tuple[int, int], name: str, off: float
) -> npt.NDArray[np.float32]:
    """(rows, 1): the named parameter for `rows`, and `off`, the value without effect, for all others."""
    values = np.full((shape[0], 1), off, dtype=np.float32)
    for row, params in rows:
        values[row, 0] = getattr(params, name)
    return values
