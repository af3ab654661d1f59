"""Generates a job's choices as deltas. All routes use it, streamed or not.

An answer that is not streamed is the accumulated stream (`answer.py`), so both have the same content by construction.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Sequence

from fastserve.engine.contract import EngineRequest, RequestOutput, RequestStream, SamplingParams
from fastserve.errors import FastserveError, InternalError, RequestAbortedError
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.adapters import ServedAdapters
from fastserve.worker.admission import Admission
from fastserve.worker.beam_search import BeamSearch, BeamSettings
from fastserve.worker.choice import Choice, ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.keeper import EngineKeeper
from fastserve.worker.mailbox import Mailbox
from fastserve.worker.metrics import RequestOfAdapter, WorkerMetrics

KEEP_ALIVE_S = 1.0
"""Silence after which a stream sends a keep-alive."""


class GenerationService:
    def __init__(
        self,
        keeper: EngineKeeper,
        tokenizer: Tokenizer,
        admission: Admission,
        metrics: WorkerMetrics,
        adapters: ServedAdapters,
    ) -> None:
        self._keeper = keeper
        self._tokenizer = tokenizer
        self._admission = admission
        self._metrics = metrics
        self._adapters = adapters
        self._numbers = itertools.count()

    async def generate(self, job: Job, *, tick_s: float = KEEP_ALIVE_S) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Batches of deltas, in order for each choice. An empty batch means that there was none for `tick_s` seconds.

        Holds the permit and the engine's requests, and releases them however the generator ends. Raises OverloadedError
        before the first batch; EngineDeadError, RequestAbortedError or InternalError at any time.
        """
        box: Mailbox[ChoiceDelta] = Mailbox(tick_s)
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

    async def _run(self, job: Job, box: Mailbox[ChoiceDelta]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            use = stack.enter_context(self._metrics.adapters_in_use.request(job.adapter))
            await stack.enter_async_context(self._admission.permit(job.caller.lease, job.prompt_tokens))
            self._keeper.require_ready()  # the engine may have died during the wait
            await self._adapters.ensure(job.adapter)
            self._metrics.queue_time.observe(time.monotonic() - job.caller.arrived_s)
            self._metrics.prompt_tokens.inc(job.prompt_tokens)
            name = f"{job.caller.request_id}-{next(self._numbers)}"
            if job.beams is not None:
                await self._search(job, job.beams, name, box, use)
                return
            running = asyncio.Semaphore(job.max_running)
            runs = [self._run_choice(job, f"{name}-{index}", index, box, use, running) for index in job.choices]
            if len(runs) == 1:
                await runs[0]
                return
            try:
                async with asyncio.TaskGroup() as group:
                    for run in runs:
                        group.create_task(run)
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from errors

    async def _run_choice(
        self,
        job: Job,
        request_id: str,
        index: int,
        box: Mailbox[ChoiceDelta],
        use: RequestOfAdapter,
        running: asyncio.Semaphore,
    ) -> None:
        """`running`: of the runs of this job that the engine has at once."""
        prompt = job.prompts[index // job.num_runs]
        choice = Choice(index, self._tokenizer, prompt.params, job.output, prompt.token_ids)
        request = EngineRequest(
            request_id,
            prompt.token_ids,
            prompt.params,
            choice=index,
            priority=job.priority,
            adapter=job.adapter,
            cache_salt=job.cache_salt,
            predicted_ids=job.predicted_ids or [],
        )
        async with running:
            with self._keeper.engine.generate(request) as stream:
                listener = _ChoiceListener(stream, choice, box, self._metrics, job.caller.arrived_s, use)
                stream.listen(listener.on_output)
                await listener.finished  # a stop string ends it first: leaving aborts the request

    async def _search(
        self, job: Job, settings: BeamSettings, name: str, box: Mailbox[ChoiceDelta], use: RequestOfAdapter
    ) -> None:
        """Answer each prompt by beam search. Each step is a request to the engine for one token of each beam, whose
        other tokens are mostly in the prefix cache."""
        for at, prompt in enumerate(job.prompts):
            search = BeamSearch(settings, prompt.params.max_tokens)
            params = SamplingParams(1, temperature=0.0, logprobs=settings.num_top)
            num_cached: int | None = None
            for step in itertools.count():
                if not search.beams:
                    break
                requests = [
                    EngineRequest(
                        f"{name}-{at}-{step}-{number}",
                        prompt.token_ids + beam.token_ids,
                        params,
                        priority=job.priority,
                        adapter=job.adapter,
                        cache_salt=job.cache_salt,
                    )
                    for number, beam in enumerate(search.beams)
                ]
                outputs = await self._run_all(requests)
                if num_cached is None:
                    use.start()
                    num_cached = outputs[0].num_cached_tokens
                search.step([output.logprobs[0].top for output in outputs if output.logprobs])
            for rank, beam in enumerate(search.finished[: job.num_choices]):
                index = at * job.num_choices + rank
                choice = Choice(index, self._tokenizer, prompt.params, job.output, prompt.token_ids)
                output = RequestOutput(
                    name, beam.token_ids, finish_reason=beam.finish_reason, num_cached_tokens=num_cached or 0
                )
                delta = choice.push(output)
                if delta is not None and index in job.choices:
                    box.put(delta)

    async def _run_all(self, requests: Sequence[EngineRequest]) -> list[RequestOutput]:
        """The outputs of requests for one token."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run_one(request)) for request in requests]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    async def _run_one(self, request: EngineRequest) -> RequestOutput:
        with self._keeper.engine.generate(request) as stream:
            async for output in stream:
                if output.finish_reason is not None:
                    _raise_if_ended(output)
                    return output
        raise InternalError("The engine ended a request without its last output.")


class _ChoiceListener:
    """Passes the outputs of a choice on in the callback that delivers them: waking a task of the choice for each output
    would cost as much as all other processing of it.
    """

    def __init__(
        self,
        stream: RequestStream,
        choice: Choice,
        box: Mailbox[ChoiceDelta],
        metrics: WorkerMetrics,
        arrived_s: float,
        use: RequestOfAdapter,
    ) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done after the last delta; holds the exception if the choice failed."""
        self._stream = stream
        self._choice = choice
        self._box = box
        self._metrics = metrics
        self._use = use
        self._last = arrived_s
        self._is_first = True

    def on_output(self) -> None:
        if self.finished.done():
            return
        try:
            self._take()
        except Exception as error:  # noqa: BLE001  raised where the choice is awaited; other choices go on
            self.finished.set_exception(error)

    def _take(self) -> None:
        output = self._stream.take()
        if output is None:
            return
        _raise_if_ended(output)
        now = time.monotonic()
        if self._is_first:
            self._is_first = False
            self._use.start()
            self._metrics.time_to_first_token.observe(now - self._last)
        else:
            self._metrics.inter_token.observe((now - self._last) / max(1, len(output.token_ids)))
        self._last = now
        delta = self._choice.push(output)
        if delta is not None:
            self._box.put(delta)
            if delta.finish_reason is not None:
                self.finished.set_result(None)


def _raise_if_ended(output: RequestOutput) -> None:
    """Raise the error of a request that did not come to its end."""
    if output.finish_reason == "abort":
        raise RequestAbortedError("An administrator has aborted the requests on this worker. Send it again.")
    if output.finish_reason == "error":
        raise InternalError(f"The engine ended the request: {output.error}.")
