"""How long a rank waits for another one in a step: a multiple of the longest step so far.

A rank that computes without end is alive and not stopped, so nothing but its silence shows that it is lost. How long a
rank may be silent depends on the model and the machine, which earlier steps show. In the first step, while weights are
read or set, and on devices whose kernels are compiled when a step first needs them, the wait is MAX_STEP_SILENCE_S.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastserve.engine.ranks.processes import MAX_STEP_SILENCE_S

if TYPE_CHECKING:
    from fastserve.engine.ranks.collectives import Collectives

MIN_STEP_SILENCE_S = 5.0
"""Far more than a busy machine keeps a rank from its core."""
_LONGEST_STEPS = 10
"""Longest wait, in steps as long as the longest so far: a rank waits for less than a step's work of another."""


class StepDeadline:
    """Sets the longest wait of a rank's collectives in each step. Each rank has one, of the steps that it has seen."""

    def __init__(
        self, collectives: Collectives, clock: Callable[[], float] = time.monotonic, *, may_compile: bool = False
    ) -> None:
        """`may_compile`: whether any step may compile kernels."""
        self._collectives = collectives
        self._may_compile = may_compile
        self._clock = clock
        self._longest_s = 0.0
        self._begin_s = 0.0
        self._num_steps = 0

    @property
    def wait_s(self) -> float:
        """Longest wait for another rank in the next step."""
        if self._num_steps == 0 or self._may_compile:
            return MAX_STEP_SILENCE_S
        return min(MAX_STEP_SILENCE_S, max(MIN_STEP_SILENCE_S, _LONGEST_STEPS * self._longest_s))

    def begin(self) -> None:
        """Call it when a step begins."""
        self._collectives.set_timeout(self.wait_s)
        self._begin_s = self._clock()

    def end(self) -> None:
        """Call it when the step is done; not after one that failed."""
        self._longest_s = max(self._longest_s, self._clock() - self._begin_s)
        self._num_steps += 1
        self._collectives.set_timeout(MAX_STEP_SILENCE_S)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step that begins and ends here."""
        self.begin()
        yield
        self.end()
