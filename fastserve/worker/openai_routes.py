"""OpenAI's routes on the worker itself: a worker is a complete server for its model."""

from __future__ import annotations

import time
from typing import Any, Protocol

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.openai.answers import JSON, Usage, encode_json
from fastserve.openai.chat import ChatRequest, ChatStream, chat_choice, chat_response
from fastserve.openai.completions import (
    CompletionRequest,
    CompletionStream,
    completion_choice,
    completion_response,
)
from fastserve.openai.models import ModelCards, describe_model
from fastserve.openai.sampling import parse_request
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.responses import StreamResponse, run_until_disconnect
from fastserve.worker.caller import caller_of
from fastserve.worker.choice import Delta
from fastserve.worker.jobs import Job
from fastserve.worker.prompts import Echo, logprobs_by_id, with_echo
from fastserve.worker.runtime import Runtime, runtime_of
from fastserve.worker.service import ChoiceAnswer, fold
from fastserve.worker.sse import events

router = APIRouter()
_CLIENT_GONE = 499


class Writer(Protocol):
    """Turns what a stream brings into OpenAI's events."""

    def delta(self, delta: Delta) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...


@router.get("/v1/models")
async def models(request: Request) -> Response:
    runtime = runtime_of(request)
    cards = [describe_model(name, runtime.started_at) for name in runtime.jobs.model_names]
    return Response(ModelCards(data=cards).model_dump_json(), media_type=JSON)


@router.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    runtime, caller, created = runtime_of(request), caller_of(request), int(time.time())
    with runtime.metrics.refusals():
        runtime.keeper.require_ready()
        body = parse_request(ChatRequest, await request.body())
        job = await runtime.jobs.chat(body, caller)
    if body.stream:
        stream = ChatStream(caller.request_id, created, body.model, include_usage=body.wants_usage)
        return _stream(runtime, job, ChatWriter(stream), include_usage=body.wants_usage)
    answer = await run_until_disconnect(request, fold(runtime.service, job))
    if answer is None:
        return Response(status_code=_CLIENT_GONE)
    told = answer.choices
    choices = [chat_choice(i, one.text, one.finish_reason, one.tokens) for i, one in enumerate(told)]
    prompt_logprobs = _prompt_logprobs(runtime, told[0], body.prompt_logprobs)
    return _json(job, chat_response(caller.request_id, created, body.model, choices, answer.usage, prompt_logprobs))


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    runtime, caller, created = runtime_of(request), caller_of(request), int(time.time())
    with runtime.metrics.refusals():
        runtime.keeper.require_ready()
        body = parse_request(CompletionRequest, await request.body())
        job = await runtime.jobs.completion(body, caller)
    echoes = [Echo(runtime.jobs.tokenizer, prompt, body.logprobs or 0) if body.echo else None for prompt in job.prompts]
    if body.stream:
        stream = CompletionStream(caller.request_id, created, body.model, include_usage=body.wants_usage)
        per_choice = [echo for echo in echoes for _ in range(job.num_choices)]
        return _stream(runtime, job, CompletionWriter(stream, per_choice), include_usage=body.wants_usage)
    answer = await run_until_disconnect(request, fold(runtime.service, job))
    if answer is None:
        return Response(status_code=_CLIENT_GONE)
    choices = []
    for i, one in enumerate(answer.choices):
        text, tokens = with_echo(echoes[i // job.num_choices], one)
        prompt_logprobs = _prompt_logprobs(runtime, one, body.prompt_logprobs)
        choices.append(completion_choice(i, text, one.finish_reason, tokens, prompt_logprobs))
    return _json(job, completion_response(caller.request_id, created, body.model, choices, answer.usage))


def _prompt_logprobs(runtime: Runtime, choice: ChoiceAnswer, num_top: int | None) -> Any:
    """vLLM's field, when it was asked for."""
    return None if num_top is None else logprobs_by_id(runtime.jobs.tokenizer, choice.prompt_logprobs or [], num_top)


def _json(job: Job, body: dict[str, Any]) -> Response:
    return Response(encode_json(body), media_type=JSON, headers={REQUEST_ID_HEADER: job.caller.request_id})


def _stream(runtime: Runtime, job: Job, writer: Writer, *, include_usage: bool) -> Response:
    response = StreamResponse(events(runtime.service, job, writer.delta, writer.usage if include_usage else None))
    response.headers[REQUEST_ID_HEADER] = job.caller.request_id
    return response


class ChatWriter:
    def __init__(self, stream: ChatStream) -> None:
        self._stream = stream
        self._begun: set[int] = set()
        self.usage = stream.usage

    def delta(self, delta: Delta) -> bytes:
        out = b""
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            out = self._stream.start(delta.choice)
        # A chunk also for tokens that have no text yet: it tells the client that the answer goes on.
        if delta.finish_reason is None or delta.text or delta.tokens:
            out += self._stream.delta(delta.choice, delta.text, delta.tokens)
        if delta.finish_reason is not None:
            out += self._stream.end(delta.choice, delta.finish_reason)
        return out


class CompletionWriter:
    def __init__(self, stream: CompletionStream, echoes: list[Echo | None]) -> None:
        """`echoes`: what each choice begins with."""
        self._stream = stream
        self._echoes = echoes
        self._begun: set[int] = set()
        self.usage = stream.usage

    def delta(self, delta: Delta) -> bytes:
        text, tokens, echo = delta.text, delta.tokens, self._echoes[delta.choice]
        if echo is not None:
            if delta.choice not in self._begun:
                self._begun.add(delta.choice)
                text, tokens = with_echo(echo, delta)
            elif tokens:
                tokens = echo.shift(tokens)
        return self._stream.delta(delta.choice, text, tokens, delta.finish_reason)
