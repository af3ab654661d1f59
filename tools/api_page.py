"""Writes docs/api.md: every route of the API server, with every field of its request.

The page is made from the schemas (`fastserve/openai/routes.py`), whose fields' docstrings say what they do, from the
lists of undeclared fields (`fastserve/openai/parameters.py`), and from the routes that the API server answers itself.
`python -m tools.api_page` writes it; a test compares.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastserve.gateway import adapter_routes, ollama_routes
from fastserve.gateway import routes as model_list_routes
from fastserve.gateway.batches import routes as batch_routes
from fastserve.gateway.stored import routes as stored_routes
from fastserve.gateway.stored.routes import ConversationRequest
from fastserve.openai.adapters import LoadAdapterBody, UnloadAdapterBody
from fastserve.openai.anthropic import WITHOUT_EFFECT as ANTHROPIC_FIELDS
from fastserve.openai.anthropic import CountTokensRequest
from fastserve.openai.batches import BatchRequest
from fastserve.openai.chat import ChatMessage
from fastserve.openai.embeddings import KNOWN_FIELDS as POOLING_FIELDS
from fastserve.openai.embeddings import PoolingFields
from fastserve.openai.generation import GenerationRequest
from fastserve.openai.parameters import MESSAGE_FIELDS, REQUEST_FIELDS, KnownFields
from fastserve.openai.responses.request import PASSED_ON, ResponsesRequest
from fastserve.openai.responses.request import REQUEST_FIELDS as RESPONSES_FIELDS
from fastserve.openai.routes import RELAYED_ROUTES, ModelRoute

OWN_ROUTERS: Mapping[str, APIRouter] = {
    "Models and health": model_list_routes.router,
    "Stored responses and conversations": stored_routes.router,
    "Files and batches": batch_routes.router,
    "Lists for Ollama's clients": ollama_routes.router,
    "Adapters, for administrators": adapter_routes.router,
}
"""Routes that the API server answers itself, by the heading that they have on the page."""
_OWN_BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/conversations": ConversationRequest,
    "/v1/conversations/{conversation_id}": ConversationRequest,
    "/v1/conversations/{conversation_id}/items": ConversationRequest,
    "/v1/batches": BatchRequest,
    adapter_routes.LOAD: LoadAdapterBody,
    adapter_routes.UNLOAD: UnloadAdapterBody,
}
"""Bodies of their POST routes. All others have none, but for the form of /v1/files."""
_UNDECLARED: Mapping[type[BaseModel], KnownFields] = {
    GenerationRequest: REQUEST_FIELDS,
    ResponsesRequest: RESPONSES_FIELDS,
    PoolingFields: POOLING_FIELDS,
    CountTokensRequest: KnownFields("", ANTHROPIC_FIELDS, {}),
}
PAGE = Path(__file__).parents[1] / "docs" / "api.md"
_HEAD = """# The API, field by field

All routes of the API server: first those that workers answer, then those that it answers itself. `python -m
tools.api_page` makes this page from the schemas that check requests; `/openapi.json` of an API server says the same to
machines.

null is the same as a missing field. A field that this page does not name has no effect: the log and the metric
`fastserve_worker_unknown_fields_total` name it. [parameters.md](parameters.md) says more about sampling, and
[limits.md](limits.md) how much of everything a request may bring.
"""
_RANGE = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
_NO_EFFECT = "Accepted; no effect"


def page() -> str:
    parts = [_HEAD, _index()]
    described: dict[type[BaseModel], str] = {}
    for route in RELAYED_ROUTES:
        parts.append(f"## {heading(route)}\n\n{route.summary}. The answer: {_answer(route)}.\n")
        if route.request in described:
            parts.append(f"The fields are those of `{described[route.request]}`.\n")
            continue
        described[route.request] = route.path
        parts += _tables(route.request)
    for title, router in OWN_ROUTERS.items():
        parts.append(f"## {title}\n")
        parts += _own_routes(router, described)
    return "\n".join(parts)


def heading(route: ModelRoute) -> str:
    return f"`{route.method} {route.path.replace(':path}', '}')}`"


def _index() -> str:
    rows = [
        f"| [{heading(route)}](#{_anchor(heading(route))}) | {_escaped(route.summary)} |" for route in RELAYED_ROUTES
    ]
    own = [f"[{title}](#{_anchor(title)})" for title in OWN_ROUTERS]
    table = "\n".join(["| routes that workers answer | |", "|---|---|", *rows])
    return f"{table}\n\nRoutes that the API server answers itself: {', '.join(own)}.\n"


def _anchor(title: str) -> str:
    """The anchor that a heading gets when its Markdown is rendered."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _own_routes(router: APIRouter, described: dict[type[BaseModel], str]) -> Iterator[str]:
    """Routes that the API server answers itself: a table of them, and the fields of their bodies."""
    app = FastAPI()
    app.include_router(router)
    paths = app.openapi()["paths"]
    rows = ["| route | what it does | query parameters |", "|---|---|---|"]
    bodies: dict[type[BaseModel], list[str]] = {}
    for method, path in listed_routes(router):
        operation = paths[path][method.lower()]
        text = _escaped(" ".join(operation["description"].split()))
        rows.append(f"| `{method} {path}` | {text} | {_query(operation)} |")
        if method == "POST" and path in _OWN_BODIES:
            bodies.setdefault(_OWN_BODIES[path], []).append(f"`POST {path}`")
    yield "\n".join(rows) + "\n"
    for body, routes in bodies.items():
        described[body] = routes[0]
        yield f"The body of {', '.join(routes)}:\n"
        yield from _tables(body)


def listed_routes(router: APIRouter) -> list[tuple[str, str]]:
    """Methods and paths of the routes that are described."""
    found = [route for route in router.routes if isinstance(route, APIRoute) and route.include_in_schema]
    return [(method, route.path_format) for route in found for method in sorted(route.methods or ())]


def _query(operation: Mapping[str, Any]) -> str:
    texts = []
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "query":
            text = parameter.get("description", "").rstrip(".")
            texts.append(f"`{parameter['name']}` ({_kind(parameter['schema'], {})})" + (f": {text}" if text else ""))
    return _escaped("; ".join(texts))


def _answer(route: ModelRoute) -> str:
    is_object = route.answer.replace(".", "").replace("_", "").isalpha()
    return f"an object `{route.answer}` with `{route.contents}`" if is_object else route.answer


def _tables(request: type[BaseModel]) -> list[str]:
    schema = request.model_json_schema()
    definitions = schema.get("$defs", {})
    parts = [_table(request, schema, definitions)]
    for inner in _nested(request):
        parts.append(f"Fields of `{inner.__name__}`:\n")
        parts.append(_table(inner, definitions[inner.__name__], definitions))
        if inner is ChatMessage:
            parts += _undeclared(MESSAGE_FIELDS, inner.model_fields)
    if issubclass(request, ResponsesRequest):
        parts.append(f"Also, as in a chat: {', '.join(f'`{name}`' for name in PASSED_ON)}.\n")
    for schema_class, fields in _UNDECLARED.items():
        if issubclass(request, schema_class):
            parts += _undeclared(fields, [*request.model_fields, *PASSED_ON])
    return parts


def _nested(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that are types of fields, theirs included, in order of appearance."""
    found: dict[type[BaseModel], None] = {}
    for field in model.model_fields.values():
        for inner in _models_in(field.annotation):
            found |= dict.fromkeys([inner, *_nested(inner)])
    return list(found)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _table(model: type[BaseModel], schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Fields that must be given come first, those without effect last."""
    required = schema.get("required", [])
    infos = {info.alias or name: info for name, info in model.model_fields.items()}
    written = _docstrings(model)
    docstrings = {info.alias or name: written.get(name, "") for name, info in model.model_fields.items()}
    rows = []
    for name, field in schema["properties"].items():
        kind = " ".join([_kind(field, definitions), *_range(infos[name])])
        text = " ".join((infos[name].description or docstrings[name]).split())
        mark = " (required)" if name in required else ""
        order = (name not in required, text.startswith(_NO_EFFECT))
        rows.append((order, f"| `{name}`{mark} | {_escaped(kind)} | {_escaped(text)} |"))
    rows.sort(key=lambda row: row[0])
    return "\n".join(["| field | type | what it does |", "|---|---|---|", *(row for _, row in rows)]) + "\n"


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings below the fields of a model, by field."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            if isinstance(definition, ast.ClassDef):
                found |= dict(_documented(definition.body))
    return found


def _documented(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, following in itertools.pairwise(body):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, text


def _range(field: FieldInfo) -> list[str]:
    """The range of a number."""
    return [
        text.format(f"{bound:g}" if abs(bound) < 1e6 else f"{bound:.0f}")
        for part in field.metadata
        for key, text in _RANGE.items()
        if (bound := getattr(part, key, None)) is not None
    ]


def _undeclared(known: KnownFields, declared: Iterable[str]) -> list[str]:
    """Sentences about fields that the schema does not declare."""
    refused = [
        f"`{name}`{_but_for(neutral)}" for name, neutral in sorted(known.unsupported.items()) if name not in declared
    ]
    accepted = [f"`{name}`" for name in sorted(known.without_effect) if name not in declared]
    return [
        *([f"Accepted without effect: {', '.join(accepted)}.\n"] if accepted else []),
        *([f"Refused by name: {', '.join(refused)}.\n"] if refused else []),
    ]


def _but_for(neutral: Iterable[Any]) -> str:
    """Values of an unsupported field that are not refused."""
    values = list(dict.fromkeys(json.dumps(value) for value in neutral if not isinstance(value, float)))
    return f" (but for {', '.join(f'`{value}`' for value in values)})" if values else ""


def _kind(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A short description of a JSON schema, without null."""
    if "anyOf" in field:
        kinds = [_kind(part, definitions) for part in field["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"`{name}`" if "properties" in definitions.get(name, {}) else _kind(definitions[name], definitions)
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = str(field.get("type", "any"))
    if kind == "array":
        items: Mapping[str, Any] = field.get("items") or next(iter(field.get("prefixItems", [])), {})
        return f"array of {_kind(items, definitions)}" if items else kind
    return f"{kind} of at most {field['maxLength']} characters" if "maxLength" in field else kind


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
