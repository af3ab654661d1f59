"""A job becomes deltas of text: the one path that every route takes, streamed or not.

A non-streamed answer is the stream folded (`fold`), so both are the same by construction.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastserve.engine.contract import EngineRequest, TokenLogprob
from fastserve.errors import FastserveError, InternalError, RequestAbortedError
from fastserve.openai.answers import TokenText, Usage
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.admission import Admission
from fastserve.worker.choice import Choice, Delta
from fastserve.worker.jobs import Job, Prompt
from fastserve.worker.keeper import EngineKeeper
from fastserve.worker.mailbox import Mailbox
from fastserve.worker.metrics import WorkerMetrics

KEEP_ALIVE_S = 1.0
"""A stream that has nothing to say for this long says so."""


class GenerationService:
    def __init__(
        self, keeper: EngineKeeper, tokenizer: Tokenizer, admission: Admission, metrics: WorkerMetrics
    ) -> None:
        self._keeper = keeper
        self._tokenizer = tokenizer
        self._admission = admission
        self._metrics = metrics
        self._numbers = itertools.count()

    async def generate(self, job: Job, *, tick_s: float = KEEP_ALIVE_S) -> AsyncGenerator[list[Delta], None]:
        """Batches of deltas, in order for each choice; an empty batch says that nothing came for `tick_s`.

        Holds the permit and the engine's requests; both end with the generator, however that ends. Raises
        OverloadedError or EngineDeadError before the first batch, EngineDeadError or InternalError also later.
        """
        box: Mailbox[Delta] = Mailbox(tick_s)
        work = asyncio.create_task(self._run(job, box))
        work.add_done_callback(lambda _: box.close())
        outcome = "disconnected"
        try:
            while (batch := await box.take()) is not None:
                yield batch
            await work
            outcome = "completed"
        except FastserveError as error:
            outcome = error.code or error.type
            raise
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self._metrics.requests.labels(outcome).inc()

    async def _run(self, job: Job, box: Mailbox[Delta]) -> None:
        async with self._admission.permit(job.caller.lease, job.prompt_tokens):
            self._keeper.require_ready()  # it may have died while we waited
            self._metrics.queue_time.observe(time.monotonic() - job.caller.arrived)
            self._metrics.prompt_tokens.inc(job.prompt_tokens)
            number = next(self._numbers)
            runs = [
                self._run_choice(job, prompt, f"{job.caller.request_id}-{number}-{at}-{i}", at * job.num_runs + i, box)
                for at, prompt in enumerate(job.prompts)
                for i in range(job.num_runs)
            ]
            if len(runs) == 1:
                await runs[0]
                return
            try:
                async with asyncio.TaskGroup() as group:
                    for run in runs:
                        group.create_task(run)
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from errors

    async def _run_choice(self, job: Job, prompt: Prompt, request_id: str, index: int, box: Mailbox[Delta]) -> None:
        choice = Choice(index, self._tokenizer, prompt.params, job.telling)
        request = EngineRequest(
            request_id, prompt.token_ids, prompt.params, choice=index % job.num_runs, priority=job.priority
        )
        last = job.caller.arrived
        first = True
        with self._keeper.engine.generate(request) as outputs:
            async for output in outputs:
                if output.finish_reason == "abort":
                    raise RequestAbortedError("An administrator has aborted what was running here. Send it again.")
                if output.finish_reason == "error":
                    raise InternalError(f"The engine ended the request: {output.error}.")
                now = time.monotonic()
                if first:
                    self._metrics.time_to_first_token.observe(now - last)
                    first = False
                else:
                    self._metrics.inter_token.observe((now - last) / max(1, len(output.token_ids)))
                last = now
                delta = choice.push(output)
                if delta is not None:
                    box.put(delta)
                    if delta.finish_reason is not None:
                        return  # perhaps before the engine's end: leaving aborts


@dataclass
class ChoiceAnswer:
    text: str = ""
    tokens: list[TokenText] | None = None
    finish_reason: str | None = None
    num_tokens: int = 0
    cached_tokens: int = 0
    logprob_sum: float = 0.0
    prompt_logprobs: list[TokenLogprob] | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        if delta.tokens is not None:
            self.tokens = self.tokens or []
            self.tokens += delta.tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.count(delta)

    def count(self, delta: Delta) -> None:
        """Take what concerns usage only."""
        self.finish_reason = delta.finish_reason
        self.num_tokens = delta.num_tokens
        self.cached_tokens = delta.cached_tokens
        self.logprob_sum = delta.logprob_sum

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, the stop token included."""
        return self.logprob_sum / max(1, self.num_tokens)


@dataclass
class Answer:
    """What a stream has brought so far."""

    job: Job
    runs: list[ChoiceAnswer] = field(init=False)
    """Every choice that was generated."""

    def __post_init__(self) -> None:
        self.runs = [ChoiceAnswer() for _ in range(len(self.job.prompts) * self.job.num_runs)]

    @property
    def choices(self) -> list[ChoiceAnswer]:
        """Those that are told: of each prompt's runs the likeliest, best first. Equal ones keep their order."""
        job = self.job
        if job.num_runs == job.num_choices:
            return self.runs
        told: list[ChoiceAnswer] = []
        for at in range(0, len(self.runs), job.num_runs):
            best = sorted(self.runs[at : at + job.num_runs], key=lambda run: run.mean_logprob, reverse=True)
            told += best[: job.num_choices]
        return told

    @property
    def usage(self) -> Usage:
        # A prompt is computed once for all of its choices, so it counts once, and so does what was cached of it.
        cached = sum(run.cached_tokens for run in self.runs[:: self.job.num_runs])
        return Usage(self.job.prompt_tokens, sum(run.num_tokens for run in self.runs), cached)


async def fold(service: GenerationService, job: Job) -> Answer:
    """The whole answer."""
    answer = Answer(job)
    async with aclosing(service.generate(job)) as batches:
        async for batch in batches:
            for delta in batch:
                answer.runs[delta.choice].add(delta)
    return answer
