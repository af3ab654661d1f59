"""OpenAI's routes on the worker itself: a worker is a complete server for its model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.openai.answers import JSON, Usage, encode_json
from fastserve.openai.chat import ChatStream, chat_choice, chat_response
from fastserve.openai.completions import (
    CompletionStream,
    completion_choice,
    completion_response,
)
from fastserve.openai.models import ModelCards, describe_model
from fastserve.openai.routes import CHAT, COMPLETIONS
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.responses import StreamResponse, run_until_disconnect
from fastserve.worker.caller import Caller, caller_of, read_body
from fastserve.worker.choice import Delta
from fastserve.worker.jobs import Job, JobMaker
from fastserve.worker.prompts import Echo, logprobs_by_id, with_echo
from fastserve.worker.runtime import ModelHandler, Runtime, metrics_of, runtime_of
from fastserve.worker.service import ChoiceAnswer, fold
from fastserve.worker.sse import events

router = APIRouter()
_CLIENT_GONE = 499
_BYTES_PER_LOGPROB = 16


class Writer(Protocol):
    """Turns what a stream brings into OpenAI's events."""

    def delta(self, delta: Delta) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...


@router.get("/v1/models")
async def models(request: Request) -> Response:
    runtime = runtime_of(request)
    cards = [describe_model(name, runtime.started_at) for name in runtime.jobs.model_names]
    return Response(ModelCards(data=cards).model_dump_json(), media_type=JSON)


async def chat(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await _prepare(request, lambda jobs: jobs.chat)
    options, request_id = job.answer, job.caller.request_id
    if options.stream:
        stream = ChatStream(request_id, created, options.model, include_usage=options.include_usage)
        return _stream(runtime, job, ChatWriter(stream))
    answer = await run_until_disconnect(request, fold(runtime.service, job))
    if answer is None:
        return Response(status_code=_CLIENT_GONE)

    def write() -> bytes:
        told = answer.choices
        choices = [chat_choice(one.index, one.text, one.finish_reason, one.tokens) for one in told]
        prompt_logprobs = _prompt_logprobs(runtime, told[0], options.prompt_logprobs)
        return encode_json(chat_response(request_id, created, options.model, choices, answer.usage, prompt_logprobs))

    return _json(job, await runtime.pool.run(_written_bytes(job), write))


async def completions(request: Request) -> Response:
    created = int(time.time())
    runtime, job = await _prepare(request, lambda jobs: jobs.completion)
    options, request_id = job.answer, job.caller.request_id
    echoes = await runtime.pool.run(_written_bytes(job), lambda: _echoes(runtime, job))
    if options.stream:
        stream = CompletionStream(request_id, created, options.model, include_usage=options.include_usage)
        per_choice = [echo for echo in echoes for _ in range(job.num_choices)]
        return _stream(runtime, job, CompletionWriter(stream, per_choice))
    answer = await run_until_disconnect(request, fold(runtime.service, job))
    if answer is None:
        return Response(status_code=_CLIENT_GONE)

    def write() -> bytes:
        choices = []
        for one in answer.choices:
            text, tokens = with_echo(echoes[one.index // job.num_choices], one)
            prompt_logprobs = _prompt_logprobs(runtime, one, options.prompt_logprobs)
            choices.append(completion_choice(one.index, text, one.finish_reason, tokens, prompt_logprobs))
        return encode_json(completion_response(request_id, created, options.model, choices, answer.usage))

    return _json(job, await runtime.pool.run(_written_bytes(job), write))


HANDLERS = (
    ModelHandler(CHAT, chat, lambda runtime: runtime.jobs.has_chat_template),
    ModelHandler(COMPLETIONS, completions, lambda _: True),
)
"""The routes that a worker has for its model."""


async def _prepare(
    request: Request, choose: Callable[[JobMaker], Callable[[bytes, Caller], Job]]
) -> tuple[Runtime, Job]:
    """The job of a request's body. Refusals are counted, also while the model loads."""
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        make = choose(runtime.jobs)
        body = await read_body(request)
        return runtime, await runtime.pool.run(len(body), lambda: make(body, caller))


def _echoes(runtime: Runtime, job: Job) -> list[Echo | None]:
    if not job.answer.echo:
        return [None] * len(job.prompts)
    return [Echo(runtime.jobs.tokenizer, prompt, job.answer.logprobs or 0) for prompt in job.prompts]


def _written_bytes(job: Job) -> int:
    """About what is to be written of the prompt; an answer is written on the event loop where there is none."""
    options = job.answer
    if not options.echo and options.prompt_logprobs is None:
        return 0
    return job.prompt_tokens * (1 + max(options.logprobs or 0, options.prompt_logprobs or 0)) * _BYTES_PER_LOGPROB


def _prompt_logprobs(runtime: Runtime, choice: ChoiceAnswer, num_top: int | None) -> Any:
    """vLLM's field, when it was asked for."""
    return None if num_top is None else logprobs_by_id(runtime.jobs.tokenizer, choice.prompt_logprobs or [], num_top)


def _json(job: Job, body: bytes) -> Response:
    return Response(body, media_type=JSON, headers={REQUEST_ID_HEADER: job.caller.request_id})


def _stream(runtime: Runtime, job: Job, writer: Writer) -> Response:
    write_usage = writer.usage if job.answer.include_usage else None
    response = StreamResponse(events(runtime.service, job, writer.delta, write_usage))
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
