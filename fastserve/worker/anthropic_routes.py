"""Anthropic's Messages API on the worker."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fastserve.openai.routes import COUNT_TOKENS, MESSAGES
from fastserve.worker.anthropic_request import count_tokens, make_job
from fastserve.worker.prepare import prepare
from fastserve.worker.responses import respond
from fastserve.worker.writers.anthropic import AnthropicWriter

router = APIRouter()


@router.post(MESSAGES.path)
async def messages(request: Request) -> Response:
    runtime, job = await prepare(request, MESSAGES, lambda runtime, *given: make_job(runtime.jobs, *given))
    return await respond(request, runtime, job.job, AnthropicWriter(job))


@router.post(COUNT_TOKENS.path)
async def count(request: Request) -> Response:
    _, num_tokens = await prepare(request, COUNT_TOKENS, lambda runtime, *given: count_tokens(runtime.jobs, *given))
    return JSONResponse({"input_tokens": num_tokens})
