"""OpenAI's Responses API on the worker, without state: requests carry all their items."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.errors import InvalidRequestError
from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.body import renamed
from fastserve.openai.responses.answer import response_object
from fastserve.openai.responses.head import ResponseHead, new_id
from fastserve.openai.responses.request import read_request
from fastserve.openai.responses.translate import to_chat
from fastserve.worker.caller import Caller, caller_of, read_body
from fastserve.worker.grammars import preparing_bytes
from fastserve.worker.jobs import Job, JobMaker
from fastserve.worker.responses import respond
from fastserve.worker.runtime import Runtime, metrics_of, runtime_of
from fastserve.worker.writers.responses import ResponsesWriter

router = APIRouter()


@dataclass(frozen=True)
class _Prepared:
    runtime: Runtime
    job: Job
    writer: ResponsesWriter


@router.post("/v1/responses")
async def create(request: Request) -> Response:
    prepared = await _prepare(request)
    return await respond(request, prepared.runtime, prepared.job, prepared.writer)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(request: Request) -> Response:
    prepared = await _prepare(request)
    answer = {"object": "response.input_tokens", "input_tokens": prepared.job.prompt_tokens}
    return Response(encode_json(answer), media_type=JSON)


async def _prepare(request: Request) -> _Prepared:
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        body = await read_body(request)
        return await runtime.pool.run(
            preparing_bytes(body), lambda: _Prepared(runtime, *_make_job(runtime.jobs, body, caller))
        )


def _make_job(jobs: JobMaker, body: bytes, caller: Caller) -> tuple[Job, ResponsesWriter]:
    """Raises RequestError with the names of the Responses API."""
    head = caller.read_head()
    asked = read_request(body, jobs.settings.bounds)
    chat = to_chat(asked, jobs.settings.bounds, head)
    try:
        job = jobs.chat_from_fields(chat.fields, caller)
    except InvalidRequestError as error:
        raise renamed(error, chat.names) from error
    params = job.prompts[0].params
    response = response_object(
        asked, head or ResponseHead(new_id("resp"), int(time.time())), "in_progress", chat.tools
    ) | {"temperature": params.temperature, "top_p": params.top_p}
    options = asked.stream_options
    obfuscates = options is not None and bool(options.include_obfuscation)
    return job, ResponsesWriter(response, chat.custom_tools, obfuscates=obfuscates)
