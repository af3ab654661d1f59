"""S-LoRA's two generation routes on the worker."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.worker.caller import caller_of, read_body
from fastserve.worker.responses import respond
from fastserve.worker.runtime import metrics_of, runtime_of
from fastserve.worker.slora_request import make_job
from fastserve.worker.writers.slora import SLoraWriter

router = APIRouter()


@router.post("/generate")
async def generate(request: Request) -> Response:
    return await _answer(request, stream=False)


@router.post("/generate_stream")
async def generate_stream(request: Request) -> Response:
    return await _answer(request, stream=True)


async def _answer(request: Request, *, stream: bool) -> Response:
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        body = await read_body(request)
        job, has_details = await runtime.pool.run(len(body), lambda: make_job(runtime, body, caller, stream=stream))
    return await respond(request, runtime, job, SLoraWriter(runtime.jobs.tokenizer.special_ids, has_details))
