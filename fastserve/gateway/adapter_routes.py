"""vLLM's routes that load and unload adapters, for administrators: each call goes to all workers of the base model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from fastserve.access.admin import require_admin
from fastserve.access.outgoing import read_bounded
from fastserve.errors import InvalidRequestError, NoWorkerError
from fastserve.gateway.dispatch import Dispatcher
from fastserve.openai.adapters import (
    LoadAdapterBody,
    UnloadAdapterBody,
    load_message,
    read_adapter_body,
    unload_message,
)
from fastserve.openai.body import shown

router = APIRouter(dependencies=[Depends(require_admin)])
TIMEOUT = aiohttp.ClientTimeout(total=600.0)
MAX_ANSWER_BYTES = 65_536
MAX_SHOWN_CHARS = 1000
UNREACHABLE = 502


@router.post("/v1/load_lora_adapter")
async def load(request: Request) -> Response:
    """Load an adapter on all workers of a base model."""
    content = await request.body()
    body = read_adapter_body(content, LoadAdapterBody)
    return await _call_workers(request, content, body.base_model_name, load_message(body.lora_name))


@router.post("/v1/unload_lora_adapter")
async def unload(request: Request) -> Response:
    """Unload an adapter on all workers of a base model."""
    content = await request.body()
    body = read_adapter_body(content, UnloadAdapterBody)
    return await _call_workers(request, content, body.base_model_name, unload_message(body.lora_name))


async def _call_workers(request: Request, content: bytes, base: str | None, message: str) -> Response:
    """The answer has the outcome of each worker. Its status is 200 if all succeeded, else the highest of theirs."""
    dispatcher: Dispatcher = request.state.gateway.dispatcher
    await dispatcher.ensure_fresh()
    addresses = dispatcher.workers_of(_base(dispatcher, base))
    if not addresses:
        raise NoWorkerError("No worker of the model is known now. Try again in a moment.")
    headers = {"content-type": "application/json"}
    if request.state.has_admin_keys:
        # The caller's token is the administrator's key, which the workers check too. Without such keys the token, if
        # any, is an API key: it stays here, and the session sends the cluster key.
        headers["Authorization"] = request.headers["authorization"]
    url_path = request.url.path
    outcomes = await asyncio.gather(*(_call(dispatcher, address, url_path, content, headers) for address in addresses))
    status = max(outcome["status"] for outcome in outcomes)
    if status == 200:
        return JSONResponse({"message": message, "workers": outcomes})
    failed = next(outcome for outcome in outcomes if outcome["status"] == status)
    num_failed = sum(outcome["status"] != 200 for outcome in outcomes)
    text = f"{num_failed} of {len(outcomes)} workers failed; {failed['address']}: {failed['message']}"
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
