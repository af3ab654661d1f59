"""The contract of executors, which compute the scheduler's plans."""

from __future__ import annotations

from typing import Protocol

from fastserve.engine.plan import StepPlan, StepResult


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait until the step is done. Called once for each step, in the order of the launches."""
        ...


class Executor(Protocol):
    """Computes plans: a runner in this process, or several ranks in parallel."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step. Steps run in the order in which they are launched; at most two are in flight: when this is
        called, at most one result has not been read yet."""
        ...
