"""OpenAI's routes on the worker, which is a complete server for its model."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.openai.answers import JSON
from fastserve.openai.models import ModelCards, describe_model
from fastserve.openai.routes import CHAT, COMPLETIONS
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.responses import StreamResponse, run_until_disconnect
from fastserve.worker.answer import fold, stream_answer
from fastserve.worker.caller import Caller, caller_of, read_body
from fastserve.worker.jobs import Job, JobMaker
from fastserve.worker.runtime import ModelHandler, Runtime, metrics_of, runtime_of
from fastserve.worker.writers import AnswerWriter
from fastserve.worker.writers.chat import ChatWriter
from fastserve.worker.writers.completions import CompletionWriter

router = APIRouter()
_CLIENT_GONE = 499
_BYTES_PER_LOGPROB = 16
"""Work of writing one log probability, as bytes of a body of the same cost (see `PromptPool.run`)."""


@router.get("/v1/models")
async def models(request: Request) -> Response:
    runtime = runtime_of(request)
    cards = [describe_model(name, runtime.started_at) for name in runtime.jobs.settings.model_names]
    return Response(ModelCards(data=cards).model_dump_json(), media_type=JSON)


async def chat(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await _prepare(request, lambda jobs: jobs.chat)
    return await _answer(request, runtime, job, ChatWriter(job, created, runtime.jobs.tokenizer))


async def completions(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await _prepare(request, lambda jobs: jobs.completion)
    tokenizer = runtime.jobs.tokenizer
    writer = await runtime.pool.run(_written_bytes(job), lambda: CompletionWriter(job, created, tokenizer))
    return await _answer(request, runtime, job, writer)


HANDLERS = (
    ModelHandler(CHAT, chat, lambda runtime: runtime.jobs.has_chat_template),
    ModelHandler(COMPLETIONS, completions, lambda _: True),
)
"""The worker's model routes."""


async def _prepare(
    request: Request, choose: Callable[[JobMaker], Callable[[bytes, Caller], Job]]
) -> tuple[Runtime, Job]:
    """Read the body and make a job. Refusals are counted, also while the model loads."""
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        make = choose(runtime.jobs)
        body = await read_body(request)
        return runtime, await runtime.pool.run(len(body), lambda: make(body, caller))


async def _answer(request: Request, runtime: Runtime, job: Job, writer: AnswerWriter) -> Response:
    headers = {REQUEST_ID_HEADER: job.caller.request_id}
    if job.answer.stream:
        response = StreamResponse(stream_answer(runtime.service, job, writer))
        response.headers.update(headers)
        return response
    result = await run_until_disconnect(request, fold(runtime.service, job))
    if result is None:
        return Response(status_code=_CLIENT_GONE)
    body = await runtime.pool.run(_written_bytes(job), lambda: writer.whole(result))
    return Response(body, media_type=JSON, headers=headers)


def _written_bytes(job: Job) -> int:
    """Approximate work of writing the prompt into the answer, for `PromptPool.run`; 0 if the answer has no prompt."""
    options = job.answer
    if not options.echo and options.prompt_logprobs is None:
        return 0
    return job.prompt_tokens * (1 + max(options.logprobs or 0, options.prompt_logprobs or 0)) * _BYTES_PER_LOGPROB
