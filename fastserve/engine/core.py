"""The engine's core: one scheduler, one executor, one loop of schedule, launch, commit.

With `overlap`, step n + 1 is planned and launched while step n runs, so the device does not wait for Python. Step n + 1
is planned after step n only where its plan needs the tokens of n (`Scheduler.can_run_ahead`), or where drafts are
expected to gain more time than waiting for these tokens costs (`Speculator.is_worth_waiting`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from fastserve.engine.adapters.manager import AdapterManager
from fastserve.engine.calls.handling import Adapters, NoAdapters, NoWeights, Weights
from fastserve.engine.contract import (
    STEP_SECONDS_BOUNDS,
    STEP_SIZE_BOUNDS,
    EngineInfo,
    EngineRequest,
    EngineStats,
    Histogram,
    RequestOutput,
    SamplingParams,
)
from fastserve.engine.executor import Executor, PendingStep
from fastserve.engine.grammars import GrammarStore
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.occupation import EngineMemory, NoMemory, Occupation
from fastserve.engine.pausing import Pausing
from fastserve.engine.plan import MAX_EXTRA_LOGITS, MAX_EXTRA_ROWS, StepPlan
from fastserve.engine.scheduler import Drafting, Scheduler, refused
from fastserve.engine.scheduling import SchedulingPolicy
from fastserve.engine.speculation.forced_tokens import ForcedTokens
from fastserve.engine.speculation.speculator import Speculator
from fastserve.engine.speed import SpeedMeter
from fastserve.engine.updating import NoReceiver, WeightChecker, WeightReceiver, WeightUpdates
from fastserve.engine.wakeup import Wakeup
from fastserve.errors import WeightsIncompleteError

logger = logging.getLogger(__name__)

_MAX_WAIT_S = 0.005
"""For an adapter or a grammar, where nothing else can be computed; commands wait as long."""


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: StepPlan
    pending: PendingStep
    begun_s: float


class EngineCore:
    """Called by one thread. `add` and `abort` may come between any two calls of `step`."""

    def __init__(
        self,
        info: EngineInfo,
        executor: Executor,
        speed: SpeedMeter,
        *,
        policy: SchedulingPolicy,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        prefix_cache: bool,
        needs_last_token: Callable[[SamplingParams], bool],
        rope_switch_length: int | None = None,
        speculator: Speculator | None = None,
        overlap: bool = False,
        weights: Weights | None = None,
        make_adapters: Callable[[BlockPool], AdapterManager] | None = None,
        grammars: GrammarStore | None = None,
        receiver: WeightReceiver | None = None,
        checker: WeightChecker | None = None,
        memory: EngineMemory | None = None,
        model_dir: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`needs_last_token`, `rope_switch_length`: see `Scheduler`. `weights`: those of the executor's model.
        `make_adapters`: for an engine that serves adapters, whose weights take blocks of the pool. `grammars`: None
        where requests with one are refused. `receiver` and `checker`: of weights that may change; None: they cannot.
        `memory`: that may be released; weights come back from `model_dir`."""
        self.info = info
        self.weights = weights or NoWeights()
        pool = BlockPool(info.num_blocks, info.block_size, prefix_cache=prefix_cache)
        manager = None if make_adapters is None else make_adapters(pool)
        self.adapters: Adapters = manager or NoAdapters()
        self._speculator = speculator
        self._grammars = grammars
        # A draft model has the grammar too, and drafts what it forces.
        drafting: Drafting | None = speculator
        if grammars is not None and (speculator is None or not speculator.fills_later):
            drafting = ForcedTokens(grammars, speculator)
        self.scheduler = Scheduler(
            pool,
            policy=policy,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=info.max_model_len,
            max_extra_rows=min(MAX_EXTRA_ROWS, max(1, MAX_EXTRA_LOGITS // info.vocab_size)),
            needs_last_token=needs_last_token,
            rope_switch_length=rope_switch_length,
            drafting=drafting,
            adapters=manager,
            grammars=grammars,
            clock=clock,
        )
        self.pausing = Pausing(self.scheduler)
        self.wakeup = Wakeup()
        """Set when `update` has something to do."""
        self.updates = WeightUpdates(self.scheduler, self.pausing, receiver or NoReceiver(), checker, self.wakeup.set)
        self.occupation = Occupation(self.scheduler, self.pausing, self.updates, memory or NoMemory(), model_dir)
        self._executor = executor
        self._overlap = overlap
        self._in_flight: _Launched | None = None
        self._speed = speed
        self._clock = clock
        self._steps = 0
        self._step_s = 0.0
        self._done_s = 0.0
        """Time when the last step finished."""
        self._step_seconds = Histogram()
        self._step_tokens = Histogram()
        self._step_sequences = Histogram()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do. False while paused."""
        may_compute = not self.pausing.is_paused and not self.updates.blocks_steps
        return self._in_flight is not None or (self.scheduler.has_work and may_compute)

    def add(self, request: EngineRequest) -> RequestOutput | None:
        """Queue a request. If it cannot run, or is finished already, return its last output at once."""
        problem = _unknown_token(request, self.info.vocab_size)
        if problem is not None:
            return RequestOutput(request.request_id, [], finish_reason="error", error=problem)
        if self.updates.problem is not None:
            return refused(request.request_id, WeightsIncompleteError(self.updates.problem))
        return self.scheduler.add(request)

    def update(self) -> list[RequestOutput]:
        """Complete what adapters and weight updates have done meanwhile; return the outputs of the step in flight if
        that had to end before."""
        self.adapters.update()
        if not self.updates.has_news:
            return []
        outputs = self.drain()
        self.updates.update()
        return outputs

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step and return its outputs. With overlap: return those of the step in flight, if there is one, with
        the next step launched."""
        self.adapters.update()
        before = self._in_flight
        self._in_flight = None
        awaits_drafts = before is not None and self._awaits_drafts(before)
        if before is not None and not awaits_drafts and self.scheduler.can_run_ahead():
            self._in_flight = self._launch()
        outputs = [] if before is None else self._finish(before)
        if self._in_flight is None:
            self._in_flight = self._launch()
            if awaits_drafts and self._speculator is not None:
                self._speculator.charge(self._clock() - self._done_s)
        if before is None and self._in_flight is None and self.adapters.is_busy:
            self.adapters.wait(_MAX_WAIT_S)
        elif before is None and self._in_flight is None and self._grammars is not None and self._grammars.is_busy:
            self._grammars.wait(_MAX_WAIT_S)
        if not self._overlap and self._in_flight is not None:
            outputs = self._finish(self._in_flight)
            self._in_flight = None
        return outputs + self.scheduler.take_refused()

    def drain(self) -> list[RequestOutput]:
        """Wait for the step in flight, if there is one, and return its outputs. Afterwards no step is in flight."""
        in_flight, self._in_flight = self._in_flight, None
        return [] if in_flight is None else self._finish(in_flight)

    def _awaits_drafts(self, before: _Launched) -> bool:
        """Whether the next step must wait for this one because of drafts: in this step, or perhaps in the next."""
        return self._speculator is not None and (
            before.plan.has_drafts or self._speculator.is_worth_waiting(self.scheduler.decoding)
        )

    def _launch(self) -> _Launched | None:
        """Plan and launch a step; None when there is nothing to compute."""
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return None
        begin_s = self._clock()
        return _Launched(plan, self._executor.launch(plan), begin_s)

    def _finish(self, step: _Launched) -> list[RequestOutput]:
        """Wait for a step and commit its result."""
        result = step.pending.result()
        now_s = self._clock()
        # The device started it when it was launched or, if later, when the step before was done.
        self._step_s = now_s - max(step.begun_s, self._done_s)
        self._done_s = now_s
        plan = step.plan
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
            paused=self.pausing.is_paused,
            pausing=self.pausing.is_pausing,
            weight_version=self.updates.version,
            weight_updates=self.updates.count,
            weights_incomplete=self.updates.problem is not None,
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_blocks - scheduler.pool.num_free,
            adapters=self.adapters.stats if isinstance(self.adapters, AdapterManager) else None,
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


def _unknown_token(request: EngineRequest, vocab_size: int) -> str | None:
    """Why a request with a token id outside of the vocabulary cannot run: it would index beyond the model's tensors."""
    params = request.params
    for field, ids in (
        ("prompt_ids", request.prompt_ids),
        ("emitted_ids", request.emitted_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
            return f"{field}: token id {wrong} is not in the vocabulary, whose ids run from 0 to {vocab_size - 1}"
    return None
