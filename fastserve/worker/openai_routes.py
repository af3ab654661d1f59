"""OpenAI's routes on the worker, which is a complete server for its model."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.openai.answers import JSON
from fastserve.openai.models import ModelCards, describe_model
from fastserve.openai.routes import CHAT, COMPLETIONS
from fastserve.worker.caller import Caller, caller_of, read_body
from fastserve.worker.grammars import preparing_bytes
from fastserve.worker.jobs import Job, JobMaker
from fastserve.worker.responses import respond, written_bytes
from fastserve.worker.runtime import ModelHandler, Runtime, metrics_of, runtime_of
from fastserve.worker.writers.chat import ChatWriter
from fastserve.worker.writers.completions import CompletionWriter

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    runtime = runtime_of(request)
    names = runtime.jobs.settings.model_names
    version = runtime.keeper.engine.stats.weight_version
    cards = [describe_model(name, runtime.started_at, weight_version=version) for name in names]
    cards += [
        describe_model(adapter.name, runtime.started_at, parent=names[0], root=adapter.source, weight_version=version)
        for adapter in runtime.adapters.all()
    ]
    return Response(ModelCards(data=cards).model_dump_json(), media_type=JSON)


async def chat(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await _prepare(request, lambda jobs: jobs.chat)
    return await respond(request, runtime, job, ChatWriter(job, created, runtime.jobs.tokenizer))


async def completions(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await _prepare(request, lambda jobs: jobs.completion)
    tokenizer = runtime.jobs.tokenizer
    writer = await runtime.pool.run(written_bytes(job), lambda: CompletionWriter(job, created, tokenizer))
    return await respond(request, runtime, job, writer)


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
        return runtime, await runtime.pool.run(preparing_bytes(body), lambda: make(body, caller))
