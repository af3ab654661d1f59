"""Who carries out the plans of steps."""

from __future__ import annotations

from typing import Protocol

from fastserve.engine.plan import StepPlan, StepResult


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait until the step is done. To be asked for once, and in the order of the launches."""
        ...


class Executor(Protocol):
    """Whatever carries out plans: a runner in this process, or several ranks that do the same in step."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Begin a step; steps run in the order in which they are launched. It may come before the result of the step
        before was asked for, but not before that of the last but one."""
        ...
