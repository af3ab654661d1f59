"""Anthropic's Messages API on the worker."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fastserve.openai.routes import COUNT_TOKENS, MESSAGES
from fastserve.worker.anthropic_request import count_tokens, make_job
from fastserve.worker.caller import caller_of, read_body
from fastserve.worker.grammars import preparing_bytes
from fastserve.worker.responses import respond
from fastserve.worker.runtime import metrics_of, runtime_of
from fastserve.worker.writers.anthropic import AnthropicWriter

router = APIRouter()


@router.post(MESSAGES.path)
async def messages(request: Request) -> Response:
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        body = await read_body(request)
        job = await runtime.pool.run(preparing_bytes(body), lambda: make_job(runtime.jobs, body, caller))
    return await respond(request, runtime, job.job, AnthropicWriter(job))


@router.post(COUNT_TOKENS.path)
async def count(request: Request) -> Response:
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        body = await read_body(request)
        num_tokens = await runtime.pool.run(preparing_bytes(body), lambda: count_tokens(runtime.jobs, body, caller))
    return JSONResponse({"input_tokens": num_tokens})
