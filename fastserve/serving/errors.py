"""Exceptions to HTTP answers, in the shape of the route's API."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from fastserve.errors import FastserveError, InternalError, InvalidRequestError
from fastserve.observability.text import printable
from fastserve.serving.error_shapes import request_id_of, shape_of

logger = logging.getLogger(__name__)

MAX_SHOWN_CHARS = 80
MAX_LISTED_ROUTES = 40
MAX_LISTED_ERRORS = 64
CLIENT_GONE = 499
NOT_BUILT = (
    "assistants",
    "audio",
    "containers",
    "evals",
    "fine_tuning",
    "images",
    "moderations",
    "realtime",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
)
"""First path segments after /v1/ of OpenAI's and related APIs that fastserve does not have."""


def error_response(error: FastserveError, scope: Scope, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """`scope`: of the request, whose route gives the shape. `headers`: besides those of the error."""
    shape = shape_of(scope)
    body = shape.body(error, request_id_of(scope))
    return JSONResponse(body, status_code=shape.status(error), headers={**error.headers(), **(headers or {})})


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of the application in the shape of its route."""

    async def ours(request: Request, error: Exception) -> Response:
        ours = error if isinstance(error, FastserveError) else InternalError(str(error))
        return error_response(ours, request.scope)

    async def invalid(request: Request, error: Exception) -> Response:
        found = error.errors() if isinstance(error, RequestValidationError) else []
        # The first part of a place says whether it is in the body, the query or the path.
        problems = [problem | {"loc": problem["loc"][1:]} for problem in found[:1]]
        return error_response(explain(problems), request.scope)

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        if status == 404:
            return error_response(_no_such_route(request), request.scope)
        if status == 405:
            refusal, allowed = _wrong_method(request)
            return error_response(refusal, request.scope, {"Allow": ", ".join(allowed)})
        named = InvalidRequestError(str(getattr(error, "detail", error)), code=f"http_{status}")
        named.status = status
        return error_response(named, request.scope, error.headers if isinstance(error, HTTPException) else None)

    async def gone(_: Request, __: Exception) -> Response:
        # The client is gone, so nobody reads the answer.
        return Response(status_code=CLIENT_GONE)

    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, printable(request.url.path), exc_info=error)
        return error_response(unexpected_error(), request.scope)

    app.add_exception_handler(FastserveError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(404, http)
    app.add_exception_handler(405, http)
    app.add_exception_handler(Exception, unexpected)


# ---- validation errors ------------------------------------------------------------------------------------------


def first_error(error: ValidationError) -> InvalidRequestError:
    """The first of pydantic's validation errors, as a sentence.

    pydantic can only return all of them, each a dict with its input. If there are many, the sentence only gives their
    number. Lists of messages should stop at the first error (`Annotated[list[...], FailFast()]`).
    """
    if error.error_count() > MAX_LISTED_ERRORS:
        return InvalidRequestError(f"The request body has {error.error_count()} invalid values.")
    return explain(error.errors(include_url=False))


def explain(problems: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """The first of pydantic's validation errors, as a sentence with field, value and remedy in JSON's terms."""
    if not problems:
        return InvalidRequestError("The request body is not valid.")
    first = problems[0]
    path = [str(part) for part in first.get("loc", ())]
    name = printable(".".join(path) or "body", MAX_SHOWN_CHARS)
    kind = first.get("type")
    context = first.get("ctx", {})
    if kind == "missing":
        return InvalidRequestError(f"Missing required field '{name}'.", param=name, code="missing_required_parameter")
    if kind == "json_invalid":
        reason = printable(str(context.get("error", "")), MAX_SHOWN_CHARS)
        if "hex escape" in reason or "surrogate" in reason:
            reason = f"half of a surrogate pair (\\ud800 to \\udfff alone) is no character{_position(reason)}"
        return InvalidRequestError(f"The request body is not valid JSON: {reason}.", code="invalid_json")
    if kind == "extra_forbidden":
        return InvalidRequestError(f"The field '{name}' is not known.", param=name)
    if kind == "string_pattern_mismatch":
        # A regular expression explains little; ours exclude line ends and terminal codes.
        sentence = "It may not be empty or hold control characters"
    else:
        sentence = printable(str(first.get("msg", "")).removeprefix("Value error, ").rstrip("."))
        sentence = sentence.replace("Input should be", "It must be").replace("Input should", "It must")
    return InvalidRequestError(f"Invalid value for '{name}': {shown(first.get('input'))}. {sentence}.", param=name)


def _position(reason: str) -> str:
    """Position at which the parser stopped, taken from the end of its message."""
    _, at, place = reason.partition(" at line ")
    return at + place


def shown(value: object) -> str:
    """A value of a request as JSON on one line, shortened."""
    if isinstance(value, str):
        return '"' + printable(value, MAX_SHOWN_CHARS).replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    if isinstance(value, list | tuple | set | frozenset):
        return f"an array of {len(value)} values"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 70 digits"
    try:
        return printable(json.dumps(value), MAX_SHOWN_CHARS)
    except (TypeError, ValueError):
        return f"a value of type {type(value).__name__}"


# ---- unknown routes ---------------------------------------------------------------------------------------------


def _no_such_route(request: Request) -> InvalidRequestError:
    path = request.scope["path"]
    asked = f"{request.method} {printable(path, MAX_SHOWN_CHARS)}"
    words = path.strip("/").split("/")
    if words[0] == "v1" and len(words) > 1 and words[1] in NOT_BUILT:
        error = InvalidRequestError(
            f"'{asked}' is not supported yet. {_list_routes(request)}", code="unsupported_route"
        )
    else:
        error = InvalidRequestError(f"There is no route '{asked}'. {_list_routes(request)}", code="unknown_route")
    error.status = 404
    return error


def _wrong_method(request: Request) -> tuple[InvalidRequestError, list[str]]:
    path = request.scope["path"]
    allowed = sorted({method for route in _routes(request) if route.path_regex.match(path) for method in route.methods})
    asked = f"{printable(request.method, 20)} {printable(path, MAX_SHOWN_CHARS)}"
    error = InvalidRequestError(f"'{asked}' is not possible: use {' or '.join(allowed)}.", code="wrong_method")
    error.status = 405
    return error, allowed


def _list_routes(request: Request) -> str:
    """The server's routes, as far as there is room, OpenAI's first."""
    found = sorted(
        {
            (not route.path.startswith("/v1/"), f"{'/'.join(methods)} {route.path}")
            for route in _routes(request)
            if (methods := sorted(route.methods - {"HEAD"}))
        }
    )
    more = ", ..." if len(found) > MAX_LISTED_ROUTES else ""
    return f"This server's routes are {', '.join(name for _, name in found[:MAX_LISTED_ROUTES])}{more}."


def _routes(request: Request) -> Iterator[Any]:
    """The application's routes with a path and methods; newer releases of FastAPI nest included routers."""
    yield from _flatten(request.app.routes)


def _flatten(routes: Iterable[Any]) -> Iterator[Any]:
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _flatten(included.routes)
        elif getattr(route, "methods", None) and hasattr(route, "path_regex"):
            yield route


def unexpected_error() -> InternalError:
    """Answer to an unexpected exception, without its details, which are in the log."""
    return InternalError("The server failed on this request; its log has the cause.")
