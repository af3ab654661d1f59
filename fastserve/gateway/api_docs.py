"""`/openapi.json` and `/docs`: a description of the API server's routes.

FastAPI describes the routes that it knows. The generation endpoints are plain ASGI, so their request schemas are added
here. The page loads no scripts and no styles, so it works offline.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import HTMLResponse, JSONResponse, Response

from fastserve.access.api_keys import PUBLIC_PATHS
from fastserve.gateway.apis.find import api_of
from fastserve.openai.routes import MODEL_IN_PATH, ModelRoute
from fastserve.serving.error_shapes import OVERLOADED_STATUS

REF = "#/components/schemas/{model}"
ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
BEFORE_ROUTES = {
    "400": "The request is wrong, and `param` names the field; or the model does not support this route",
    "401": "The API key is missing or not known",
    "403": "The API key is right, but not for this; or a web page of another origin asks",
    "408": "The request did not come in time",
    "413": "The request is too large",
    "415": "The body is compressed",
    "421": "The Host header names another server",
    "431": "The headers are too large",
    "500": "A defect, or a request that workers died of (`request_killed_workers`)",
    "503": "The server, or each worker, cannot take the request now; Retry-After says when to try again",
    "508": "The request came back to a server that had forwarded it",
}
"""Errors that any route may answer, since most come before it. By status."""
NOT_FOUND = {"404": "What the request names does not exist, or not for this API key"}
OF_WORKERS = NOT_FOUND | {
    "429": "All workers are full; Retry-After says when to try again",
    "502": "The workers' answers were none",
    "504": "The worker was silent for too long",
}
REFUSALS = OF_WORKERS | {"409": "Its state does not allow this", "429": "There is no room for more now"}
DESCRIPTIONS = {
    "openai": "With `stream: true` the answer comes as server-sent events, the last one is `[DONE]`.",
    "responses": "With `stream: true` the answer comes as typed events; the last one has the whole response.",
    "slora": "`lora_dir` names an adapter: its path as given to the worker, or its name; without it, the base model.",
    "anthropic": "With `stream: true` the answer comes as named server-sent events, the last one is `message_stop`.",
    "ollama": "Without `stream: false` the answer comes as lines of JSON, the last one has `done: true`.",
    "tokens": "Nothing is generated.",
}
"""By the API of a route."""
ERROR_SCHEMAS = {
    **dict.fromkeys(("openai", "responses", "slora", "tokens"), "Error"),
    "anthropic": "AnthropicError",
    "ollama": "OllamaError",
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": ERROR["properties"]["error"],
        "request_id": {"type": "string"},
    },
}
OLLAMA_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}, "code": {"type": ["string", "null"]}},
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { border-top: 1px solid #ccc; padding-top: 1em; } code { background: #f3f3f3; padding: 0 .2em; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .2em .6em; }
tr:nth-child(even) { background: #f8f8f8; }
"""


def json_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself, as JSON of this model."""
    schema = model.model_json_schema(ref_template=REF)
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def may_refuse(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route with errors besides those that any route may answer."""
    return {status: {"description": REFUSALS[str(status)]} for status in statuses}


def answers_with(media_type: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose answer may have this type."""
    return {200: {"content": {media_type: {}}}}


def install_api_docs(app: FastAPI, routes: Iterable[ModelRoute]) -> None:
    """Call this after all routes have been added. Both routes need the same access as all others."""
    description = _describe(app, routes)
    page = _page(description)

    async def show_openapi(_: Request) -> Response:
        return JSONResponse(description)

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"})

    app.add_route("/openapi.json", show_openapi, methods=["GET"], include_in_schema=False)
    app.add_route("/docs", show_page, methods=["GET"], include_in_schema=False)


def _describe(app: FastAPI, routes: Iterable[ModelRoute]) -> dict[str, Any]:
    description: dict[str, Any] = app.openapi()
    components = description.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR, "OllamaError": OLLAMA_ERROR}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in description["paths"].items():
        for operation in methods.values():
            _complete(operation, schemas, "OllamaError" if path.startswith("/api/") else "Error")
            operation["security"] = [] if path in PUBLIC_PATHS else [{"key": []}]
    for route in routes:
        schema = route.request.model_json_schema(ref_template=REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[route.request.__name__] = schema
        path = route.path.replace(MODEL_IN_PATH, "{model}")
        described = _describe_route(route)
        names = [item.get("operationId") for methods in description["paths"].values() for item in methods.values()]
        if described["operationId"] in names:  # an alias of another path
            described["operationId"] += re.sub(r"\W+", "_", path)
        description["paths"].setdefault(path, {})[route.method.lower()] = described
    description["paths"] = dict(sorted(description["paths"].items()))
    return description


def _complete(operation: dict[str, Any], schemas: dict[str, Any], error: str) -> None:
    """Put our errors into FastAPI's description of a route, and the schema of its body among the components."""
    answers = operation["responses"]
    answers.pop("422", None)  # FastAPI's; ours is 400
    names_entry = any(parameter["in"] == "path" for parameter in operation.get("parameters", ()))
    stated = {status: answer["description"] for status, answer in answers.items() if status != "200"}
    texts = BEFORE_ROUTES | (NOT_FOUND if names_entry else {}) | stated
    operation["responses"] = {"200": answers["200"], **_errors(texts, error)}
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is not None:
        schema = content["schema"]
        schemas.update(schema.pop("$defs", {}))
        schemas[schema["title"]] = schema
        content["schema"] = {"$ref": REF.format(model=schema["title"])}


def _errors(texts: dict[str, str], schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REF.format(model=schema)}}}
    return {status: {"description": texts[status], "content": content} for status in sorted(texts)}


def _describe_route(route: ModelRoute) -> dict[str, Any]:
    texts = BEFORE_ROUTES | OF_WORKERS
    if route.api == "anthropic":
        texts[str(OVERLOADED_STATUS)] = texts.pop("503")
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "summary": route.summary,
        "description": DESCRIPTIONS[route.api],
        "operationId": re.sub(r"\W+", "_", route.path).strip("_"),
        "security": [{"key": []}],
        **({"parameters": [model]} if route.names_model else {}),
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": REF.format(model=route.request.__name__)}}},
        },
        "responses": {
            "200": {
                "description": route.answer
                if route.api == "slora"
                else f"OpenAI's `{route.answer}` object, or its stream",
                "content": _answers(route),
            },
            **_errors(texts, ERROR_SCHEMAS[route.api]),
        },
    }


def _answers(route: ModelRoute) -> dict[str, Any]:
    """The forms of a route's answer, by media type."""
    whole: dict[str, Any] = {"application/json": {"schema": {"type": "object", "required": [route.contents]}}}
    streamed: dict[str, Any] = {api_of(route.api).media_type: {}}
    return whole | streamed if route.streams is None else streamed if route.streams else whole


def _page(description: dict[str, Any]) -> str:
    parts = [
        f"<h1>{_text(description['info']['title'])} {_text(description['info']['version'])}</h1>",
        '<p>OpenAI\'s API. Machines read <a href="/openapi.json">openapi.json</a>. Any route may answer:</p>',
        _table("status", "answer", list(BEFORE_ROUTES.items())),
    ]
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {_text(path)}</code></h2>")
            parts.append(f"<p>{_text(route.get('summary', ''))}. {_text(route.get('description', ''))}</p>")
            parts.append(_fields(route, description["components"]["schemas"]))
            rows = [
                (status, answer["description"])
                for status, answer in route["responses"].items()
                if answer["description"] != BEFORE_ROUTES.get(status)
            ]
            parts.append(_table("status", "answer", rows))
    title = _text(description["info"]["title"])
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _fields(route: dict[str, Any], schemas: dict[str, Any]) -> str:
    """HTML table of the fields of a route's request body; empty without a body."""
    content = route.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return ""
    schema = schemas[content["schema"]["$ref"].rpartition("/")[2]]
    required = schema.get("required", [])
    rows = [
        (f"{name} (required)" if name in required else name, _kind(field))
        for name, field in schema["properties"].items()
    ]
    return _table("field", "type", rows)


def _kind(field: dict[str, Any]) -> str:
    """A short description of a JSON schema: `integer, at least 1, or null`."""
    if "anyOf" in field:
        return ", or ".join(_kind(part) for part in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    bounds = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    limits = [f"{words} {field[key]:g}" for key, words in bounds.items() if key in field]
    return ", ".join([str(field.get("type", "any")), *limits])


def _table(first: str, second: str, rows: list[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td><code>{_text(a)}</code></td><td>{_text(b)}</td></tr>" for a, b in rows)
    return f"<table><tr><th>{first}</th><th>{second}</th></tr>{body}</table>"


def _text(text: str) -> str:
    return html.escape(str(text))
