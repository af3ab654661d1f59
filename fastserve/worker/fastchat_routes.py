"""FastChat's seven worker routes, compatible with FastChat 0.2.36.

A generation is a stream of records, each with the whole text so far and a NUL byte at its end. Errors are records, too,
with HTTP 200. The caller renders the prompt itself, with the conversation from `/worker_get_conv_template`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.errors import FastserveError
from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.routes import COMPLETIONS, EMBEDDINGS
from fastserve.serving.errors import unexpected_error
from fastserve.serving.responses import StreamResponse, run_until_disconnect
from fastserve.worker.answer import fold, stream_answer
from fastserve.worker.caller import caller_of, read_body
from fastserve.worker.fastchat_request import make_job, read_prompt
from fastserve.worker.jobs import Job
from fastserve.worker.pooling_routes import answer
from fastserve.worker.prepare import prepare
from fastserve.worker.runtime import Runtime, runtime_of, status_of
from fastserve.worker.writers.fastchat import END_OF_RECORD, FastChatWriter, error_record

logger = logging.getLogger(__name__)
router = APIRouter()
Record = dict[str, Any]


@router.post("/worker_generate_stream")
async def generate_stream(request: Request) -> Response:
    # Read the body first: the response waits for the client's disconnect on the same channel.
    return StreamResponse(_stream(request, await read_body(request)), media_type="application/octet-stream")


@router.post("/worker_generate")
async def generate(request: Request) -> Response:
    record = await run_until_disconnect(request, _whole(request, await read_body(request)))
    return Response(record, media_type=JSON)


@router.post("/worker_get_embeddings")
async def embeddings(request: Request) -> Response:
    try:
        return await answer(request, EMBEDDINGS, lambda jobs, body, caller: jobs.fastchat(body, caller))
    except FastserveError as error:
        return Response(encode_json(error_record(error)), media_type=JSON)


@router.post("/worker_get_status")
async def status(request: Request) -> Record:
    return status_of(request).model_dump()


@router.post("/count_token")
async def count_token(request: Request) -> Record:
    runtime, body = runtime_of(request), await read_body(request)

    def count() -> int:
        prompt = read_prompt(body, runtime.jobs.settings.bounds)
        return runtime.jobs.encoder.count_rendered(runtime.conversation.restore(prompt))

    return {"count": await runtime.pool.run(len(body), count), "error_code": 0}


@router.post("/worker_get_conv_template")
async def conversation(request: Request) -> Record:
    return {"conv": runtime_of(request).conversation.as_dict()}


@router.post("/model_details")
async def details(request: Request) -> Record:
    return {"context_length": runtime_of(request).jobs.settings.context_length}


async def _stream(request: Request, body: bytes) -> AsyncGenerator[bytes, None]:
    """The records of a streamed answer. Errors are records, also the first one."""
    caller = caller_of(request)
    try:
        runtime, job, writer = await _prepare(request, body)
        async with aclosing(stream_answer(runtime.service, job, writer)) as pieces:
            async for piece in pieces:
                yield piece
    except FastserveError as error:
        yield encode_json(error_record(error)) + END_OF_RECORD
    except Exception:
        logger.exception("request %s failed", caller.request_id)
        yield encode_json(error_record(unexpected_error())) + END_OF_RECORD


async def _whole(request: Request, body: bytes) -> bytes:
    """The single record of an answer that is not streamed."""
    caller = caller_of(request)
    try:
        runtime, job, writer = await _prepare(request, body)
        return writer.whole(await fold(runtime.service, job))
    except FastserveError as error:
        return encode_json(error_record(error))
    except Exception:
        logger.exception("request %s failed", caller.request_id)
        return encode_json(error_record(unexpected_error()))


async def _prepare(request: Request, body: bytes) -> tuple[Runtime, Job, FastChatWriter]:
    runtime, (job, echo) = await prepare(request, COMPLETIONS, make_job, body)
    return runtime, job, FastChatWriter(job, echo)
