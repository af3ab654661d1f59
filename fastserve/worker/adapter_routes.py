"""Routes about adapters: a list for everybody, and vLLM's and SGLang's calls for administrators."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fastserve.access.admin import require_admin
from fastserve.engine.contract import AdapterInfo
from fastserve.errors import InvalidRequestError
from fastserve.openai.adapters import (
    LoadAdapterBody,
    UnloadAdapterBody,
    load_message,
    read_adapter_body,
    unload_message,
)
from fastserve.openai.body import shown
from fastserve.serving.responses import run_until_disconnect
from fastserve.worker.adapter_source import Adapter
from fastserve.worker.adapters import ServedAdapters
from fastserve.worker.caller import read_body
from fastserve.worker.responses import CLIENT_GONE
from fastserve.worker.runtime import Runtime, runtime_of

logger = logging.getLogger(__name__)
router = APIRouter()
admin_router = APIRouter(dependencies=[Depends(require_admin)])


@router.get("/adapters")
async def adapters(request: Request) -> Response:
    """All adapters, with rank, layers, memory and counts of those that the engine has read."""
    runtime = runtime_of(request)
    base = runtime.jobs.settings.model_names[0]
    data = [_describe(adapter, info, base) for adapter, info in await runtime.adapters.infos()]
    return JSONResponse({"object": "list", "data": data})


@admin_router.post("/v1/load_lora_adapter")
async def load(request: Request) -> Response:
    """vLLM's route: load an adapter from a folder and serve it."""
    body = await _load(request)
    return Response(status_code=CLIENT_GONE) if body is None else PlainTextResponse(load_message(body.lora_name))


@admin_router.post("/v1/unload_lora_adapter")
async def unload(request: Request) -> Response:
    """vLLM's route: unload an adapter. Answers when its last request has ended."""
    body = await _unload(request)
    return Response(status_code=CLIENT_GONE) if body is None else PlainTextResponse(unload_message(body.lora_name))


@admin_router.post("/load_lora_adapter")
async def load_like_sglang(request: Request) -> Response:
    body = await _load(request)
    return Response(status_code=CLIENT_GONE) if body is None else _loaded(runtime_of(request).adapters)


@admin_router.post("/unload_lora_adapter")
async def unload_like_sglang(request: Request) -> Response:
    body = await _unload(request)
    return Response(status_code=CLIENT_GONE) if body is None else _loaded(runtime_of(request).adapters)


async def _load(request: Request) -> LoadAdapterBody | None:
    """None if the client has gone; the adapter is loaded all the same."""
    body = read_adapter_body(await read_body(request), LoadAdapterBody)
    runtime = _ready(request, body.base_model_name)
    logger.info("administrator's call: load the adapter %s from %s", shown(body.lora_name), shown(body.lora_path))
    info = await run_until_disconnect(
        request, runtime.adapters.load(body.lora_name, body.lora_path, replace=body.load_inplace)
    )
    return None if info is None else body


async def _unload(request: Request) -> UnloadAdapterBody | None:
    body = read_adapter_body(await read_body(request), UnloadAdapterBody)
    runtime = _ready(request, body.base_model_name)
    logger.info("administrator's call: unload the adapter %s", shown(body.lora_name))

    async def unload() -> bool:
        await runtime.adapters.unload(body.lora_name)
        return True

    return body if await run_until_disconnect(request, unload()) else None


def _ready(request: Request, base: str | None) -> Runtime:
    runtime = runtime_of(request)
    runtime.keeper.require_ready()
    names = runtime.jobs.settings.model_names
    if base is not None and base not in names:
        raise InvalidRequestError(
            f"Invalid value for 'base_model_name': {shown(base)}. This worker serves {shown(', '.join(names))}.",
            param="base_model_name",
        )
    return runtime


def _loaded(served: ServedAdapters) -> Response:
    """SGLang's answer."""
    adapters = {adapter.name: adapter.source for adapter in served.all()}
    return JSONResponse({"success": True, "error_message": "", "loaded_adapters": adapters})


def _describe(adapter: Adapter, info: AdapterInfo | None, base: str) -> dict[str, Any]:
    described: dict[str, Any] = {"name": adapter.name, "parent": base, "root": adapter.source}
    if info is None:
        return (
            described
            | {"rank": None, "targets": None, "num_bytes": None, "location": "disk"}
            | dict.fromkeys(("num_running", "hits", "loads"), 0)
        )
    return described | {
        "rank": info.rank,
        "targets": list(info.targets),
        "num_bytes": info.num_bytes,
        "location": info.location,
        "num_running": info.num_running,
        "hits": info.hits,
        "loads": info.loads,
    }
