"""The API server's routes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from fastserve.errors import NoWorkerError
from fastserve.gateway.apis.find import api_of
from fastserve.gateway.attempt import ClientRequest
from fastserve.gateway.dispatch import Dispatcher, no_worker
from fastserve.gateway.hops import next_hops
from fastserve.gateway.metrics import GatewayMetrics
from fastserve.gateway.relay import Relay
from fastserve.observability.metrics import CONTENT_TYPE, CollectorRegistry, exposition
from fastserve.openai.anthropic import anthropic_card, anthropic_cards
from fastserve.openai.models import Model, ModelCards, describe_model
from fastserve.openai.routes import MODEL_IN_PATH, ModelRoute
from fastserve.protocol import MAX_SEED, ServedAdapter
from fastserve.serving.error_shapes import is_anthropic
from fastserve.serving.responses import run_until_disconnect

READY_REFRESH_S = 0.2
"""Shortest interval at which `/ready` refreshes the routing table while no worker is known."""


@dataclass(frozen=True)
class Gateway:
    """Objects that the routes use; created by the application's lifespan."""

    dispatcher: Dispatcher
    relay: Relay
    metrics: GatewayMetrics
    registry: CollectorRegistry
    started_at: int
    """Unix time in seconds."""


def gateway_of(request: Request) -> Gateway:
    return cast(Gateway, request.state.gateway)


GatewayDep = Annotated[Gateway, Depends(gateway_of)]


class GenerationEndpoint:
    """A route that is relayed to a worker. Plain ASGI, for little overhead on each event of a stream."""

    def __init__(self, route: ModelRoute) -> None:
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_at = time.monotonic()
        request = Request(scope, receive)
        gateway = gateway_of(request)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        client_request = await make_request(request, gateway, self._route, body, started_at)
        with gateway.metrics.in_flight.track_inprogress():
            await run_until_disconnect(request, gateway.relay.forward(client_request, send))


async def make_request(
    request: Request, gateway: Gateway, route: ModelRoute, body: bytes, started_at: float
) -> ClientRequest:
    """The request to relay. Raises InvalidRequestError, ModelNotFoundError and NoWorkerError."""
    api = api_of(route.api)
    if route.names_model:
        model, stream = request.path_params["model"], False
        route = replace(route, path=route.path.replace(MODEL_IN_PATH, quote(model)))
    else:
        model, stream = await api.read_target(body, gateway.dispatcher, streams=route.streams)
    state = request.state
    return ClientRequest(
        route,
        body,
        model,
        stream,
        state.request_id,
        next_hops(request),
        started_at,
        random.randint(0, MAX_SEED),
        api,
        may_prioritise=state.may_prioritise,
    )


def relayed_routes(routes: Iterable[ModelRoute]) -> list[BaseRoute]:
    return [Route(route.path, GenerationEndpoint(route), methods=[route.method]) for route in routes]


router = APIRouter()


@router.get("/v1/models", response_model=ModelCards)
async def list_models(gateway: GatewayDep, request: Request) -> Any:
    """The models that workers serve now, in Anthropic's form with the header `anthropic-version`."""
    cards = await model_cards(gateway)
    return JSONResponse(anthropic_cards(cards)) if is_anthropic(request.scope) else ModelCards(data=cards)


async def model_cards(gateway: Gateway) -> list[Model]:
    """Models and adapters that workers serve now."""
    await gateway.dispatcher.ensure_fresh()
    cards = [_model_card(gateway, name) for name in gateway.dispatcher.model_names()]
    return cards + [_adapter_card(gateway, name, adapter) for name, adapter in gateway.dispatcher.adapters().items()]


def _model_card(gateway: Gateway, name: str) -> Model:
    return describe_model(name, gateway.started_at, context_length=gateway.dispatcher.context_length(name))


def _adapter_card(gateway: Gateway, name: str, adapter: ServedAdapter) -> Model:
    context_length = gateway.dispatcher.context_length(adapter.parent)
    return describe_model(
        name, gateway.started_at, context_length=context_length, parent=adapter.parent, root=adapter.root
    )


@router.get("/v1/models/{model:path}", response_model=Model)
async def get_model(model: str, gateway: GatewayDep, request: Request) -> Any:
    """One model, in Anthropic's form with the header `anthropic-version`."""
    card = await _find_card(model, gateway)
    return JSONResponse(anthropic_card(card)) if is_anthropic(request.scope) else card


async def _find_card(model: str, gateway: Gateway) -> Model:
    await gateway.dispatcher.ensure_fresh()
    dispatcher = gateway.dispatcher
    if model in dispatcher.model_names():
        return _model_card(gateway, model)
    adapter = dispatcher.find_adapter(model)
    if adapter is not None:
        return _adapter_card(gateway, *adapter)
    raise no_worker(model) if dispatcher.is_known(model) else dispatcher.unknown_model(model)


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health() -> Response:
    """The process is alive."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
@router.head("/ready", include_in_schema=False)
async def ready(gateway: GatewayDep) -> Response:
    """A request could be answered: at least one worker is known."""
    if not gateway.dispatcher.model_names():
        await gateway.dispatcher.ensure_fresh(max_age_s=READY_REFRESH_S)
    if not gateway.dispatcher.model_names():
        raise NoWorkerError("No worker is known yet.")
    return JSONResponse({"status": "ready"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(gateway: GatewayDep) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(exposition(gateway.registry), media_type=CONTENT_TYPE)
