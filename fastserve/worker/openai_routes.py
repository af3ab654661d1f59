"""OpenAI's routes on the worker, which is a complete server for its model."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fastserve.openai.answers import JSON
from fastserve.openai.anthropic import anthropic_cards
from fastserve.openai.models import Model, ModelCards, describe_model
from fastserve.openai.routes import CHAT, COMPLETIONS, ModelRoute
from fastserve.serving.error_shapes import is_anthropic
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
    found = list(_cards(runtime_of(request)).values())
    if is_anthropic(request.scope):
        return JSONResponse(anthropic_cards(found))
    cards = ModelCards(data=found)
    return Response(cards.model_dump_json(), media_type=JSON)


@router.get("/v1/models/{model:path}")
async def model_card(request: Request, model: str) -> Response:
    runtime = runtime_of(request)
    adapter = runtime.adapters.require(model)
    return Response(_cards(runtime)[adapter or model].model_dump_json(), media_type=JSON)


def _cards(runtime: Runtime) -> dict[str, Model]:
    """The models and adapters that are served, by name."""
    settings = runtime.jobs.settings
    version = runtime.keeper.engine.stats.weight_version
    origins: dict[str, dict[str, str]] = {name: {} for name in settings.model_names} | {
        adapter.name: {"parent": settings.model_names[0], "root": adapter.source} for adapter in runtime.adapters.all()
    }
    return {
        name: describe_model(
            name, runtime.started_at, context_length=settings.context_length, weight_version=version, **origin
        )
        for name, origin in origins.items()
    }


async def chat(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await _prepare(request, CHAT, lambda jobs: jobs.chat)
    return await respond(request, runtime, job, ChatWriter(job, created, runtime.jobs.tokenizer))


async def completions(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await _prepare(request, COMPLETIONS, lambda jobs: jobs.completion)
    tokenizer = runtime.jobs.tokenizer
    writer = await runtime.pool.run(written_bytes(job), lambda: CompletionWriter(job, created, tokenizer))
    return await respond(request, runtime, job, writer)


HANDLERS = (
    ModelHandler(CHAT, chat, lambda runtime: runtime.pooling is None and runtime.jobs.has_chat_template),
    ModelHandler(COMPLETIONS, completions, lambda runtime: runtime.pooling is None),
)
"""The worker's model routes."""


async def _prepare(
    request: Request, route: ModelRoute, choose: Callable[[JobMaker], Callable[[bytes, Caller], Job]]
) -> tuple[Runtime, Job]:
    """Read the body and make a job. Refusals are counted, also while the model loads."""
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        runtime.require_generation(route)
        make = choose(runtime.jobs)
        body = await read_body(request)
        return runtime, await runtime.pool.run(preparing_bytes(body), lambda: make(body, caller))
