"""Ollama's API on the worker."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fastserve.observability.text import short_count
from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.body import read_fields, validate
from fastserve.openai.ollama import (
    OllamaShowRequest,
    describe,
    describe_details,
)
from fastserve.openai.routes import OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_SHOW, ModelRoute
from fastserve.serving.error_shapes import OLLAMA_ERRORS
from fastserve.worker.adapters import ServedAdapters
from fastserve.worker.caller import Caller, read_body
from fastserve.worker.jobs import JobMaker
from fastserve.worker.ollama_request import OllamaJob, find_model, make_chat_job, make_generate_job
from fastserve.worker.prepare import prepare
from fastserve.worker.responses import respond
from fastserve.worker.runtime import Runtime, runtime_of
from fastserve.worker.writers.ollama import OllamaWriter, Shape, chat_shape, generate_shape, loaded

router = APIRouter()
JSON_LINES = OLLAMA_ERRORS.stream_type.decode()
MakeJob = Callable[[JobMaker, ServedAdapters, bytes, Caller], OllamaJob]


@router.post(OLLAMA_CHAT.path)
async def chat(request: Request) -> Response:
    return await _answer(request, OLLAMA_CHAT, make_chat_job, chat_shape)


@router.post(OLLAMA_GENERATE.path)
async def generate(request: Request) -> Response:
    return await _answer(request, OLLAMA_GENERATE, make_generate_job, generate_shape)


@router.post(OLLAMA_SHOW.path)
async def show(request: Request) -> Response:
    runtime, body = runtime_of(request), await read_body(request)
    fields = read_fields(body, runtime.jobs.settings.bounds, OllamaShowRequest.model_fields)
    asked = validate(OllamaShowRequest, fields, runtime.jobs.settings.bounds)
    find_model(asked.model or asked.name or "", runtime.adapters)
    return JSONResponse(_describe(runtime))


def _describe(runtime: Runtime) -> dict[str, object]:
    info = runtime.info
    family = info.architecture.lower().removesuffix("forcausallm")
    return describe(
        template=runtime.jobs.template_source,
        details=describe_details(family, short_count(info.num_parameters), info.dtype),
        num_parameters=info.num_parameters,
        context_length=info.max_model_len,
        modified_at=runtime.started_at,
    )


async def _answer(request: Request, route: ModelRoute, make: MakeJob, shape: Shape) -> Response:
    runtime, made = await prepare(request, route, lambda runtime, *given: make(runtime.jobs, runtime.adapters, *given))
    if made.job is None:
        answer = encode_json(loaded(made.model, made.done_reason, shape))
        return Response(answer + b"\n", media_type=JSON_LINES) if made.stream else Response(answer, media_type=JSON)
    return await respond(request, runtime, made.job, OllamaWriter(made.job, made.model, shape), JSON_LINES)
