"""Runs the jobs of a model that pools."""

from __future__ import annotations

import itertools
import time

import msgspec

from fastserve.engine.contract import PoolingResult
from fastserve.errors import FastserveError, OverloadedError
from fastserve.worker.admission import Admission
from fastserve.worker.keeper import EngineKeeper
from fastserve.worker.metrics import WorkerMetrics
from fastserve.worker.pooling_request import PoolingJob, PoolingJobMaker


class PoolingService:
    def __init__(
        self,
        keeper: EngineKeeper,
        admission: Admission,
        metrics: WorkerMetrics,
        jobs: PoolingJobMaker,
    ) -> None:
        self.jobs = jobs
        self._keeper = keeper
        self._admission = admission
        self._metrics = metrics
        self._num_tokens = 0
        """Tokens of all jobs that run or wait."""
        self._numbers = itertools.count()

    async def run(self, job: PoolingJob) -> PoolingResult:
        """Raises OverloadedError, EngineDeadError or InternalError. Cancelling it aborts the job."""
        outcome = "disconnected"
        try:
            result = await self._run(job)
            outcome = "completed"
            return result
        except FastserveError as error:
            outcome = error.code or error.type
            raise
        finally:
            self._metrics.requests.labels(outcome).inc()

    async def _run(self, job: PoolingJob) -> PoolingResult:
        self._check_room(job.num_tokens)
        self._num_tokens += job.num_tokens
        try:
            async with self._admission.permit(job.caller.lease, job.num_tokens):
                self._keeper.require_ready()  # the engine may have died during the wait
                self._metrics.queue_time.observe(time.monotonic() - job.caller.arrived_s)
                self._metrics.prompt_tokens.inc(job.num_tokens)
                request_id = f"{job.caller.request_id}-{next(self._numbers)}"
                return await self._keeper.engine.pool(msgspec.structs.replace(job.request, request_id=request_id))
        finally:
            self._num_tokens -= job.num_tokens

    def _check_room(self, num_tokens: int) -> None:
        limit = self._admission.max_queued_tokens
        if self._num_tokens and self._num_tokens + num_tokens > limit:
            raise OverloadedError(
                f"This worker is busy: the texts of other requests have {self._num_tokens} tokens, of {limit} at most "
                "(--max-queued-tokens). Try again later.",
                retry_after_s=max(1.0, self._num_tokens / (self._keeper.engine.stats.tokens_per_s or self._num_tokens)),
            )
