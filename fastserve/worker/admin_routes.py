"""Administrators' routes, which call the engine. A route that vLLM has too carries vLLM's name."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from fastserve.access.admin import require_admin
from fastserve.engine.calls.pause import Pause, Resume
from fastserve.engine.calls.profile import MAX_PROFILE_STEPS, MAX_WARM_UP_STEPS, StartProfile, StopProfile
from fastserve.engine.calls.reset_prefix_cache import ResetPrefixCache
from fastserve.engine.contract import Call
from fastserve.errors import InvalidRequestError
from fastserve.openai.answers import JSON
from fastserve.openai.body import Flag, Integer, Number, RequestBounds, read_fields, shown, validate
from fastserve.serving.responses import run_until_disconnect
from fastserve.worker.caller import read_body
from fastserve.worker.responses import CLIENT_GONE
from fastserve.worker.runtime import runtime_of, status_changed

logger = logging.getLogger(__name__)
router = APIRouter(dependencies=[Depends(require_admin)])

BodyT = TypeVar("BodyT", bound=BaseModel)
ReplyT = TypeVar("ReplyT", bound=msgspec.Struct)
_MAX_TIMEOUT_S = 86400.0


class AdminBody(BaseModel):
    timeout_s: Annotated[Number, Field(gt=0, le=_MAX_TIMEOUT_S)] | None = None
    """Timeout for the engine's reply. After it the response is 504; the engine still carries out the call."""


class ResetPrefixCacheBody(AdminBody):
    reset_running_requests: Flag = False


class PauseBody(AdminBody):
    mode: Literal["keep", "wait", "abort"] = "keep"


class StartProfileBody(AdminBody):
    num_steps: Annotated[Integer, Field(ge=1, le=MAX_PROFILE_STEPS)] = MAX_PROFILE_STEPS
    num_warm_up_steps: Annotated[Integer, Field(ge=1, le=MAX_WARM_UP_STEPS)] = 1


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    body = await read_admin_body(request, ResetPrefixCacheBody)
    return await call_engine(request, body, ResetPrefixCache(body.reset_running_requests))


@router.post("/pause")
async def pause(request: Request) -> Response:
    body = await read_admin_body(request, PauseBody)
    return await call_engine(request, body, Pause(body.mode))


@router.post("/resume")
async def resume(request: Request) -> Response:
    return await call_engine(request, await read_admin_body(request, AdminBody), Resume())


@router.post("/start_profile")
async def start_profile(request: Request) -> Response:
    body = await read_admin_body(request, StartProfileBody)
    return await call_engine(request, body, StartProfile(body.num_steps, body.num_warm_up_steps))


@router.post("/stop_profile")
async def stop_profile(request: Request) -> Response:
    return await call_engine(request, await read_admin_body(request, AdminBody), StopProfile())


async def read_admin_body(request: Request, body_class: type[BodyT], *, long: Container[str] = ()) -> BodyT:
    """Parse the body, which may be empty. `long`: fields that may be as large as the body. Raises InvalidRequestError
    that names the field."""
    if request.query_params:
        name = next(iter(request.query_params))
        raise InvalidRequestError(
            f"This route takes no query parameters (given: {shown(name)}). Send a JSON object as the body.", param=name
        )
    body = await read_body(request)
    bounds = RequestBounds()
    fields = read_fields(body, bounds, body_class.model_fields, long) if body else {}
    return _validate(body_class, fields, bounds)


def read_query(request: Request, body_class: type[BodyT]) -> BodyT:
    """Parse the query's parameters as a body's fields. Raises InvalidRequestError that names the parameter."""
    fields: dict[str, Any] = {}
    for name, text in request.query_params.items():
        try:
            fields[name] = msgspec.json.decode(text)  # a number, true, false or null
        except (msgspec.MsgspecError, UnicodeEncodeError):
            fields[name] = text
    return _validate(body_class, fields, RequestBounds())


def _validate(body_class: type[BodyT], fields: Mapping[str, Any], bounds: RequestBounds) -> BodyT:
    known = body_class.model_fields
    for name in fields:
        if name not in known:
            raise InvalidRequestError(f"Unknown field {shown(name)}. This route knows: {', '.join(known)}.", param=name)
    return validate(body_class, {name: value for name, value in fields.items() if value is not None}, bounds)


async def call_engine(request: Request, body: AdminBody, call: Call[ReplyT], *, summary: str | None = None) -> Response:
    """Call the engine and return its reply as JSON. The call is carried out even if the client disconnects. `summary`:
    what the log says of a call with long arguments."""
    keeper = runtime_of(request).keeper
    keeper.require_ready()
    logger.info("administrator's call: %s", call if summary is None else summary)
    try:
        reply = await run_until_disconnect(request, keeper.engine.call(call, timeout_s=body.timeout_s))
    finally:  # a weight update that fails may leave the worker unable to serve
        status_changed(request)
    if reply is None:
        return Response(status_code=CLIENT_GONE)
    return Response(msgspec.json.encode(reply), media_type=JSON)
