"""FastChat's seven worker routes, as FastChat 0.2.36 speaks them.

Records of a generation hold the whole text so far and end in a NUL byte; an error is a record too, with HTTP 200. The
prompt comes ready-made from the caller, who wrote it with the conversation that `/worker_get_conv_template` gives.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.errors import FastserveError, InvalidRequestError, UnsupportedParameterError
from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.body import invalid, read_fields
from fastserve.serving.errors import unexpected_error
from fastserve.serving.responses import StreamResponse, run_until_disconnect
from fastserve.worker.answer import fold, stream_answer
from fastserve.worker.caller import Caller, caller_of, read_body
from fastserve.worker.jobs import Job, Prompt
from fastserve.worker.prompts import Echo
from fastserve.worker.runtime import Runtime, metrics_of, runtime_of, status_of
from fastserve.worker.writers.fastchat import END_OF_RECORD, FastChatWriter, error_record

logger = logging.getLogger(__name__)
router = APIRouter()
Record = dict[str, Any]

_DEFAULT_MAX_NEW_TOKENS = 256
_SAME_NAME = (
    "temperature",
    "repetition_penalty",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "use_beam_search",
    "images",
)
_FIELDS = frozenset({*_SAME_NAME, "best_of", "prompt", "max_new_tokens", "echo", "stop", "stop_token_ids"})


@router.post("/worker_generate_stream")
async def generate_stream(request: Request) -> Response:
    # The body is read first: the response listens for the client's end on the same channel.
    return StreamResponse(_stream(request, await read_body(request)), media_type="application/octet-stream")


@router.post("/worker_generate")
async def generate(request: Request) -> Response:
    record = await run_until_disconnect(request, _whole(request, await read_body(request)))
    return Response(record, media_type=JSON)


@router.post("/worker_get_embeddings")
async def embeddings() -> Record:
    return error_record(UnsupportedParameterError("embeddings are not supported by this model"))


@router.post("/worker_get_status")
async def status(request: Request) -> Record:
    return status_of(request).model_dump()


@router.post("/count_token")
async def count_token(request: Request) -> Record:
    runtime, body = runtime_of(request), await read_body(request)

    def count() -> int:
        prompt = _prompt(read_fields(body, runtime.jobs.bounds, _FIELDS))
        return runtime.jobs.encoder.count_rendered(runtime.conversation.restore(prompt))

    return {"count": await runtime.pool.run(len(body), count), "error_code": 0}


@router.post("/worker_get_conv_template")
async def conversation(request: Request) -> Record:
    return {"conv": runtime_of(request).conversation.as_dict()}


@router.post("/model_details")
async def details(request: Request) -> Record:
    return {"context_length": runtime_of(request).jobs.context_length}


async def _stream(request: Request, body: bytes) -> AsyncGenerator[bytes, None]:
    """The records of an answer. An error is one of them, also before the first."""
    caller = caller_of(request)
    try:
        runtime, job, writer = await _prepare(request, body, caller)
        async with aclosing(stream_answer(runtime.service, job, writer)) as pieces:
            async for piece in pieces:
                yield piece
    except FastserveError as error:
        yield encode_json(error_record(error)) + END_OF_RECORD
    except Exception:
        logger.exception("request %s failed", caller.request_id)
        yield encode_json(error_record(unexpected_error())) + END_OF_RECORD


async def _whole(request: Request, body: bytes) -> bytes:
    """The one record of an answer that is not streamed."""
    caller = caller_of(request)
    try:
        runtime, job, writer = await _prepare(request, body, caller)
        return writer.whole(await fold(runtime.service, job))
    except FastserveError as error:
        return encode_json(error_record(error))
    except Exception:
        logger.exception("request %s failed", caller.request_id)
        return encode_json(error_record(unexpected_error()))


async def _prepare(request: Request, body: bytes, caller: Caller) -> tuple[Runtime, Job, FastChatWriter]:
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        job, echo = await runtime.pool.run(len(body), lambda: _job(runtime, body, caller))
        return runtime, job, FastChatWriter(job, echo)


def _prompt(params: dict[str, Any]) -> str:
    prompt = params.get("prompt")
    if prompt is None:
        raise InvalidRequestError(
            "Missing required field 'prompt', a string.", param="prompt", code="missing_required_parameter"
        )
    if not isinstance(prompt, str):
        raise invalid("prompt", prompt, "Give a string.")
    return prompt


def _check_best_of(best_of: Any) -> None:
    if best_of not in (None, 1) or isinstance(best_of, bool):
        raise invalid(
            "best_of", best_of, "This route generates one choice: leave it out, or give 1. /v1/completions has best_of."
        )


def _job(runtime: Runtime, body: bytes, caller: Caller) -> tuple[Job, Echo | None]:
    """FastChat's parameters under OpenAI's names, and what the answer begins with. A too large max_new_tokens is
    lowered, as for OpenAI's routes.
    """
    params = read_fields(body, runtime.jobs.bounds, _FIELDS)
    prompt = _prompt(params)
    _check_best_of(params.get("best_of"))
    max_new_tokens, stop = params.get("max_new_tokens"), params.get("stop")
    fields = {name: params[name] for name in _SAME_NAME if params.get(name) is not None} | {
        "model": runtime.jobs.model_names[0],
        "prompt": runtime.jobs.encoder.encode_rendered(runtime.conversation.restore(prompt)),
        "max_tokens": _DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        "echo": params.get("echo", True),
        # FastChat's conversations may have empty ones.
        "stop": [text for text in stop if text != ""] if isinstance(stop, list) else None if stop == "" else stop,
        "stop_token_ids": _known_ids(params.get("stop_token_ids"), runtime.info.vocab_size),
        "stream": True,
    }
    try:
        job = runtime.jobs.completion_of(fields, caller)
    except InvalidRequestError as error:
        if error.param != "max_tokens":
            raise
        message = error.message.replace("'max_tokens'", "'max_new_tokens'")
        raise InvalidRequestError(message, param="max_new_tokens") from error
    if not job.answer.echo:
        return job, None
    # The caller's own text, not what it was restored to; the tokens are those that the model got.
    given = Prompt(prompt, job.prompts[0].token_ids, job.prompts[0].params)
    return job, Echo(runtime.jobs.tokenizer, given, job.answer.logprobs or 0)


def _known_ids(stop_token_ids: Any, vocab_size: int) -> Any:
    """Without the ids that the model never makes: FastChat's clients take the list from the conversation that *they*
    know under the model's name, so it may be meant for a larger vocabulary.
    """
    if not isinstance(stop_token_ids, list):
        return stop_token_ids
    return [item for item in stop_token_ids if not isinstance(item, int) or 0 <= item < vocab_size]
