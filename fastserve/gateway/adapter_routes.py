"""vLLM's routes that load and unload adapters, for administrators: each call goes to all workers of the base model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from fastserve.access.admin import require_admin
from fastserve.access.outgoing import read_bounded
from fastserve.errors import InvalidRequestError, ModelNotFoundError, NoWorkerError
from fastserve.gateway.api_docs import json_body, may_refuse
from fastserve.gateway.dispatch import Dispatcher
from fastserve.openai.adapters import (
    LoadAdapterBody,
    UnloadAdapterBody,
    load_message,
    read_adapter_body,
    unload_message,
)
from fastserve.openai.answers import encode_json
from fastserve.openai.body import shown

router = APIRouter(dependencies=[Depends(require_admin)])
TIMEOUT = aiohttp.ClientTimeout(total=600.0)
MAX_ANSWER_BYTES = 65_536
MAX_SHOWN_CHARS = 1000
UNREACHABLE = 502


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


_FAILURES = may_refuse(404, 409, 429, 502, 504)
"""The workers' own, and those of reaching them."""


@router.post(LOAD, openapi_extra=json_body(LoadAdapterBody), responses=_FAILURES)
async def load(request: Request) -> Response:
    """Load an adapter on all workers of a base model, or on none: if one fails, it is unloaded from the others again.
    With `load_inplace` there is no way back, and workers that have replaced it keep the new one.
    """
    content = await request.body()
    body = read_adapter_body(content, LoadAdapterBody)
    outcomes = await _call_workers(request, LOAD, content, body.base_model_name)
    if all(outcome["status"] == 200 for outcome in outcomes):
        return JSONResponse({"message": load_message(body.lora_name), "workers": outcomes})
    loaded = [outcome for outcome in outcomes if outcome["status"] == 200]
    if body.load_inplace:
        return _failure(outcomes, f"{len(loaded)} have the new one." if loaded else "")
    undo = encode_json({"lora_name": body.lora_name})
    undone = await _call_all(request, UNLOAD, undo, [outcome["address"] for outcome in loaded])
    for outcome, unloaded in zip(loaded, undone, strict=True):
        outcome["undone"] = unloaded["status"] == 200
    left = [outcome["address"] for outcome in loaded if not outcome["undone"]]
    return _failure(outcomes, f"It is still loaded on {', '.join(left)}." if left else "It is loaded on none.")


@router.post(UNLOAD, openapi_extra=json_body(UnloadAdapterBody), responses=_FAILURES)
async def unload(request: Request) -> Response:
    """Unload an adapter on all workers of a base model that have it. What failed can be repeated."""
    content = await request.body()
    body = read_adapter_body(content, UnloadAdapterBody)
    outcomes = await _call_workers(request, UNLOAD, content, body.base_model_name)
    statuses = {outcome["status"] for outcome in outcomes}
    if 200 in statuses and statuses <= {200, ModelNotFoundError.status}:
        return JSONResponse({"message": unload_message(body.lora_name), "workers": outcomes})
    return _failure(outcomes, "")


async def _call_workers(request: Request, path: str, content: bytes, base: str | None) -> list[dict[str, Any]]:
    """The outcome of each worker of the base model."""
    dispatcher: Dispatcher = request.state.gateway.dispatcher
    await dispatcher.ensure_fresh()
    addresses = dispatcher.workers_of(_base(dispatcher, base))
    if not addresses:
        raise NoWorkerError("No worker of the model is known now. Try again in a moment.")
    return await _call_all(request, path, content, addresses)


async def _call_all(request: Request, path: str, content: bytes, addresses: Sequence[str]) -> list[dict[str, Any]]:
    dispatcher: Dispatcher = request.state.gateway.dispatcher
    headers = {"content-type": "application/json"}
    if request.state.has_admin_keys:
        # The caller's token is the administrator's key, which the workers check too. Without such keys the token, if
        # any, is an API key: it stays here, and the session sends the cluster key.
        headers["Authorization"] = request.headers["authorization"]
    return await asyncio.gather(*(_call(dispatcher, address, path, content, headers) for address in addresses))


def _failure(outcomes: Sequence[dict[str, Any]], rest: str) -> Response:
    """The answer has the outcome of each worker. Its status is the highest of theirs."""
    status = max(outcome["status"] for outcome in outcomes)
    failed = next(outcome for outcome in outcomes if outcome["status"] == status)
    num_failed = sum(outcome["status"] != 200 for outcome in outcomes)
    text = f"{num_failed} of {len(outcomes)} workers failed; {failed['address']}: {failed['message']} {rest}".rstrip()
    error = {"message": text, "type": "adapter_error", "param": None, "code": "workers_failed"}
    return JSONResponse({"error": error, "workers": outcomes}, status_code=status)


def _base(dispatcher: Dispatcher, given: str | None) -> str:
    bases = dispatcher.base_models()
    if given is not None:
        if not dispatcher.workers_of(given):
            raise InvalidRequestError(
                f"Invalid value for 'base_model_name': {shown(given)}. Served: {shown(', '.join(bases))}.",
                param="base_model_name",
            )
        return given
    if len(bases) > 1:
        raise InvalidRequestError(
            f"Several models are served: {shown(', '.join(bases))}. Name the adapter's in base_model_name.",
            param="base_model_name",
        )
    return bases[0] if bases else ""


async def _call(
    dispatcher: Dispatcher, address: str, path: str, content: bytes, headers: dict[str, str]
) -> dict[str, Any]:
    try:
        async with dispatcher.session.post(
            address.rstrip("/") + path, data=content, headers=headers, timeout=TIMEOUT, allow_redirects=False
        ) as response:
            text = (await read_bounded(response, MAX_ANSWER_BYTES)).decode(errors="replace")
            status = response.status
    except (aiohttp.ClientError, OSError) as error:
        return {"address": address, "status": UNREACHABLE, "message": f"It cannot be reached: {error}"}
    if status != 200:
        text = _message(text)
    return {"address": address, "status": status if 200 <= status < 600 else UNREACHABLE, "message": text}


def _message(text: str) -> str:
    """The message of an error body, else the body."""
    try:
        return str(json.loads(text)["error"]["message"])[:MAX_SHOWN_CHARS]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:MAX_SHOWN_CHARS]
