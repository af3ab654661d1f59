"""The engine's core: one scheduler, one runner, one loop of schedule, execute, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from fastserve.engine.contract import (
    STEP_SECONDS_BOUNDS,
    STEP_SIZE_BOUNDS,
    EngineInfo,
    EngineRequest,
    EngineStats,
    Histogram,
    RequestOutput,
)
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.plan import StepPlan, StepResult
from fastserve.engine.scheduler import Scheduler
from fastserve.engine.speculation.speculator import Speculator
from fastserve.engine.speed import SpeedMeter

logger = logging.getLogger(__name__)

MOST_EXTRA_ROWS = 256
"""Rows of logits that a step may have beyond one for each sequence, for drafts and prompt logprobs,"""
_EXTRA_LOGITS_BYTES = 64 << 20
"""and what they may take in float32."""


class Executor(Protocol):
    """Whatever carries out a plan: a runner in this process, or several ranks that do the same in step."""

    def execute(self, plan: StepPlan) -> StepResult: ...


class EngineCore:
    """Synchronous. `add` and `abort` are called between steps."""

    def __init__(
        self,
        info: EngineInfo,
        executor: Executor,
        speed: SpeedMeter,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        prefix_cache: bool,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.info = info
        self._speculator = speculator
        self.scheduler = Scheduler(
            BlockPool(info.num_blocks, info.block_size, prefix_cache=prefix_cache),
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=info.max_model_len,
            max_extra_rows=min(MOST_EXTRA_ROWS, max(1, _EXTRA_LOGITS_BYTES // (4 * info.vocab_size))),
            drafting=speculator,
            clock=clock,
        )
        self._executor = executor
        self._speed = speed
        self._clock = clock
        self._steps = 0
        self._step_s = 0.0
        self._step_seconds = Histogram()
        self._step_tokens = Histogram()
        self._step_sequences = Histogram()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: EngineRequest) -> RequestOutput | None:
        return self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step and return what it brought. Without anything to compute, returns an empty list."""
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return []
        begin = self._clock()
        result = self._executor.execute(plan)
        self._step_s = self._clock() - begin
        self._steps += 1
        self._speed.record(plan.num_tokens, self._step_s - result.draft_s)
        self._step_seconds.add(self._step_s, STEP_SECONDS_BOUNDS)
        self._step_tokens.add(plan.num_tokens, STEP_SIZE_BOUNDS)
        self._step_sequences.add(len(plan.chunks), STEP_SIZE_BOUNDS)
        return self.scheduler.commit(plan, result)

    @property
    def stats(self) -> EngineStats:
        scheduler, speculator = self.scheduler, self._speculator
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_blocks - scheduler.pool.num_free,
            steps=self._steps,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            finished=scheduler.finished,
            aborted=scheduler.aborted,
            draft_tokens=speculator.draft_tokens if speculator else 0,
            accepted_tokens=speculator.accepted_tokens if speculator else 0,
            tokens_per_s=self._speed.tokens_per_s,
            step_s=self._step_s,
            step_seconds=self._step_seconds.copy(),
            step_tokens=self._step_tokens.copy(),
            step_sequences=self._step_sequences.copy(),
        )
