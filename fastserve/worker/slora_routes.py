"""S-LoRA's two generation routes on the worker."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.openai.routes import GENERATE, GENERATE_STREAM, ModelRoute
from fastserve.worker.prepare import prepare
from fastserve.worker.responses import respond
from fastserve.worker.slora_request import make_job
from fastserve.worker.writers.slora import SLoraWriter

router = APIRouter()


@router.post("/generate")
async def generate(request: Request) -> Response:
    return await _answer(request, GENERATE, stream=False)


@router.post("/generate_stream")
async def generate_stream(request: Request) -> Response:
    return await _answer(request, GENERATE_STREAM, stream=True)


async def _answer(request: Request, route: ModelRoute, *, stream: bool) -> Response:
    runtime, (job, has_details) = await prepare(request, route, partial(make_job, stream=stream))
    return await respond(request, runtime, job, SLoraWriter(runtime.jobs.tokenizer.special_ids, has_details))
