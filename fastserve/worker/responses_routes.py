"""OpenAI's Responses API on the worker, without state: requests carry all their items."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.errors import InvalidRequestError
from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.body import renamed
from fastserve.openai.responses.answer import response_object
from fastserve.openai.responses.head import ResponseHead, new_id
from fastserve.openai.responses.request import read_request
from fastserve.openai.responses.translate import to_chat
from fastserve.openai.routes import RESPONSE_TOKENS, RESPONSES
from fastserve.worker.caller import Caller
from fastserve.worker.jobs import Job
from fastserve.worker.prepare import prepare
from fastserve.worker.responses import respond
from fastserve.worker.runtime import Runtime
from fastserve.worker.writers.responses import ResponsesWriter

router = APIRouter()


@router.post(RESPONSES.path)
async def create(request: Request) -> Response:
    runtime, (job, writer) = await prepare(request, RESPONSES, _make_job)
    return await respond(request, runtime, job, writer)


@router.post(RESPONSE_TOKENS.path)
async def count_input_tokens(request: Request) -> Response:
    _, (job, _) = await prepare(request, RESPONSE_TOKENS, _make_job)
    answer = {"object": "response.input_tokens", "input_tokens": job.prompt_tokens}
    return Response(encode_json(answer), media_type=JSON)


def _make_job(runtime: Runtime, body: bytes, caller: Caller) -> tuple[Job, ResponsesWriter]:
    """Raises RequestError with the names of the Responses API."""
    jobs = runtime.jobs
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
