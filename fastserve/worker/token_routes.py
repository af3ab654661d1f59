"""Routes about tokens, for which no engine runs: `/tokenize`, `/detokenize`, FastChat's `/api/v1/token_check`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.body import LONG_FIELDS, read_fields, validate
from fastserve.openai.chat import ChatRequest
from fastserve.openai.routes import CHAT, DETOKENIZE, FASTCHAT_CHAT, TOKEN_CHECK, TOKENIZE
from fastserve.openai.tokens import DetokenizeRequest, TokenCheckRequest, TokenizeRequest
from fastserve.worker.caller import read_body
from fastserve.worker.openai_routes import chat
from fastserve.worker.runtime import Runtime, metrics_of, runtime_of

router = APIRouter()
router.add_api_route(FASTCHAT_CHAT.path, chat, methods=[FASTCHAT_CHAT.method])
RequestT = TypeVar("RequestT", bound=BaseModel)
_LONG = LONG_FIELDS | {"content", "tokens", "prompts"}
_OF_TEXTS = ("prompt", "content", "add_special", "parse_special", "return_token_strs", "with_pieces")


@router.post(TOKENIZE.path)
async def tokenize(request: Request) -> Response:
    def answer(runtime: Runtime, fields: dict[str, Any]) -> dict[str, Any]:
        asked = _validated(TokenizeRequest, runtime, fields)
        text, tokenizer = asked.text(), runtime.jobs.tokenizer
        if text is None:
            runtime.require_generation(replace(CHAT, path=TOKENIZE.path))
            chat_fields = {name: value for name, value in fields.items() if name not in _OF_TEXTS}
            ids = runtime.jobs.chat_token_ids(chat_fields)
        else:
            ids = tokenizer.encode(text, add_special_tokens=asked.adds_special_tokens())
        tokens: list[Any] = ids
        found: dict[str, Any] = {"count": len(ids), "max_model_len": runtime.jobs.settings.context_length}
        if asked.return_token_strs or asked.with_pieces:
            names = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in ids]
            found |= {"token_strs": names} if asked.return_token_strs else {}
            if asked.with_pieces:
                tokens = [{"id": token_id, "piece": name} for token_id, name in zip(ids, names, strict=True)]
        return found | {"tokens": tokens}

    return await _answer(request, TokenizeRequest.model_fields.keys() | ChatRequest.model_fields.keys(), answer)


@router.post(DETOKENIZE.path)
async def detokenize(request: Request) -> Response:
    def answer(runtime: Runtime, fields: dict[str, Any]) -> dict[str, Any]:
        asked = _validated(DetokenizeRequest, runtime, fields)
        text = runtime.jobs.tokenizer.decode(asked.token_ids(runtime.jobs.tokenizer.vocab_size))
        return {"prompt": text, "content": text}

    return await _answer(request, DetokenizeRequest.model_fields.keys(), answer)


@router.post(TOKEN_CHECK.path)
async def token_check(request: Request) -> Response:
    def answer(runtime: Runtime, fields: dict[str, Any]) -> dict[str, Any]:
        context_length, found = runtime.jobs.settings.context_length, []
        for item in validate(TokenCheckRequest, fields, runtime.jobs.settings.bounds).prompts:
            runtime.adapters.require(item.model)
            count = runtime.jobs.encoder.count_rendered(item.prompt)
            fits = count + item.max_tokens <= context_length
            found.append({"fits": fits, "tokenCount": count, "contextLength": context_length})
        return {"prompts": found}

    return await _answer(request, TokenCheckRequest.model_fields.keys(), answer)


def _validated(request_class: type[RequestT], runtime: Runtime, fields: dict[str, Any]) -> RequestT:
    """Raises InvalidRequestError, and ModelNotFoundError for a model that is not served here."""
    request = validate(request_class, fields, runtime.jobs.settings.bounds)
    model = fields.get("model")
    if model is not None:
        runtime.adapters.require(model)
    return request


async def _answer(request: Request, known: Any, make: Callable[[Runtime, dict[str, Any]], dict[str, Any]]) -> Response:
    """The answer that `make` gives for the fields of the body; long bodies are read and answered in a thread."""
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        body = await read_body(request)

        def work() -> bytes:
            return encode_json(make(runtime, read_fields(body, runtime.jobs.settings.bounds, known, _LONG)))

        return Response(await runtime.pool.run(len(body), work), media_type=JSON)
