"""Routes of Ollama's API that the API server answers itself: lists of models, and what it refuses."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from fastserve.errors import InvalidRequestError
from fastserve.gateway.routes import GatewayDep, model_cards
from fastserve.openai.ollama import API_VERSION, listed, running

router = APIRouter()
RUNNING = "Ollama is running"
"""Clients look for these words before they use Ollama's API."""
_PLACED = "Models are chosen when workers start (--model-path)"
_REFUSED = {
    "pull": f"{_PLACED}: start one with the model.",
    "push": "This server has no registry.",
    "create": f"{_PLACED}: start one with the model, its adapter or its quantized file.",
    "copy": "Give a model more names with --model-names when its worker starts.",
    "delete": f"{_PLACED}: end the worker of the model.",
}


@router.get("/", response_class=PlainTextResponse)
@router.head("/", include_in_schema=False)
async def root() -> Response:
    """The server is alive, in the words that Ollama's clients look for."""
    return PlainTextResponse(RUNNING)


@router.get("/api/version")
async def version() -> dict[str, str]:
    """The version of Ollama whose API this is."""
    return {"version": API_VERSION}


@router.get("/api/tags")
async def tags(gateway: GatewayDep) -> dict[str, Any]:
    """The models that workers serve now, in Ollama's form."""
    return listed(await model_cards(gateway))


@router.get("/api/ps")
async def processes(gateway: GatewayDep) -> dict[str, Any]:
    """The same list as models that are loaded: each served model is."""
    return running(await model_cards(gateway))


async def _refuse(request: Request) -> Response:
    path: str = request.scope["path"]
    action = path.removeprefix("/api/").partition("/")[0]
    remedy = _REFUSED.get(action, _REFUSED["create"])
    asked = f"{request.method} /api/{action}"
    raise InvalidRequestError(f"'{asked}' is not supported. {remedy}", code="unsupported_route")


for _action in _REFUSED:
    router.add_api_route(f"/api/{_action}", _refuse, methods=["POST", "DELETE"], include_in_schema=False)
router.add_api_route("/api/blobs/{digest}", _refuse, methods=["HEAD", "POST"], include_in_schema=False)
