"""OpenAI's routes on the worker, which is a complete server for its model."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fastserve.openai.answers import JSON
from fastserve.openai.anthropic import anthropic_cards
from fastserve.openai.models import Model, ModelCards, describe_model
from fastserve.openai.routes import CHAT, COMPLETIONS
from fastserve.serving.error_shapes import is_anthropic
from fastserve.worker.prepare import prepare
from fastserve.worker.responses import respond, written_bytes
from fastserve.worker.runtime import ModelHandler, Runtime, runtime_of
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
    runtime, job = await prepare(request, CHAT, lambda runtime, *given: runtime.jobs.chat(*given))
    return await respond(request, runtime, job, ChatWriter(job, created, runtime.jobs.tokenizer))


async def completions(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await prepare(request, COMPLETIONS, lambda runtime, *given: runtime.jobs.completion(*given))
    tokenizer = runtime.jobs.tokenizer
    writer = await runtime.pool.run(written_bytes(job), lambda: CompletionWriter(job, created, tokenizer))
    return await respond(request, runtime, job, writer)


HANDLERS = (
    ModelHandler(CHAT, chat, lambda runtime: runtime.pooling is None and runtime.jobs.has_chat_template),
    ModelHandler(COMPLETIONS, completions, lambda runtime: runtime.pooling is None),
)
"""The worker's model routes."""
