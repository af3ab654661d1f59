"""Errors as HTTP answers, all in OpenAI's shape."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from fastserve.errors import FastserveError, InternalError, InvalidRequestError

logger = logging.getLogger(__name__)


def error_response(error: FastserveError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def install_error_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape, whoever raised it."""

    async def ours(_: Request, error: Exception) -> Response:
        return error_response(error if isinstance(error, FastserveError) else InternalError(str(error)))

    async def invalid(_: Request, error: Exception) -> Response:
        problems = error.errors() if isinstance(error, RequestValidationError) else []
        return error_response(_explain(problems))

    async def http(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        named = InvalidRequestError(str(getattr(error, "detail", error)), code=f"http_{status}")
        headers = error.headers if isinstance(error, HTTPException) else None
        return JSONResponse(named.body(), status_code=status, headers=headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(InternalError("The server failed on this request; its log has the cause."))

    app.add_exception_handler(FastserveError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(404, http)
    app.add_exception_handler(405, http)
    app.add_exception_handler(Exception, unexpected)


def _explain(problems: Any) -> InvalidRequestError:
    """The first of pydantic's findings, as a sentence that names field, value and remedy."""
    if not problems:
        return InvalidRequestError("The request body is not valid.")
    first = problems[0]
    path = [str(part) for part in first.get("loc", ()) if part != "body"]
    name = ".".join(path) or "body"
    if first.get("type") == "missing":
        return InvalidRequestError(f"Missing required field '{name}'.", param=name, code="missing_required_parameter")
    if first.get("type") == "json_invalid":
        return InvalidRequestError(f"The request body is not valid JSON: {first.get('ctx', {}).get('error', '')}.")
    value = repr(first.get("input"))
    shown = value if len(value) <= 80 else value[:77] + "..."
    return InvalidRequestError(f"Invalid value for '{name}': {shown}. {first.get('msg', '')}.", param=name)
