"""Values of arguments that a model writes as bare text: their types follow from the tool's schema."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from fastserve.text.forms.json_text import is_json, string_piece

_ALL = frozenset({"null", "boolean", "integer", "number", "object", "array", "string"})
_MAX_SCHEMAS = 100
"""Maximum parts of a schema that are looked at for the types of one argument."""
_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}
_TYPES = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))
_SURROGATES = {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
_FIRST_CHARS = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}


def types_of(parameters: Mapping[str, Any], name: str) -> frozenset[str]:
    """Types that the schema of a function's parameters allows for one of them; all if it says nothing."""
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping) or name not in properties:
        return _ALL
    return frozenset(_types(properties[name], parameters)) & _ALL or _ALL


def is_text_only(types: frozenset[str]) -> bool:
    """Whether a value of these types is always a string, so that it can be sent while it comes."""
    return types == {"string"}


def _types(schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    pending = [schema]
    for _ in range(_MAX_SCHEMAS):
        if not pending:
            return
        part = pending.pop()
        if not isinstance(part, Mapping):
            continue
        kind = part.get("type")
        if isinstance(kind, str):
            yield kind
        elif isinstance(kind, list):
            yield from (one for one in kind if isinstance(one, str))
        elif "properties" in part:
            yield "object"
        elif "items" in part:
            yield "array"
        elif isinstance(part.get("enum"), list) or "const" in part:
            yield from map(_type_of, part["enum"] if isinstance(part.get("enum"), list) else [part["const"]])
        for name in ("anyOf", "oneOf", "allOf"):
            if isinstance(part.get(name), list):
                pending += part[name]
        if isinstance(part.get("$ref"), str):
            pending.append(_resolve(part["$ref"], root))


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    if not reference.startswith("#/"):
        return None
    for name in reference[2:].split("/"):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _type_of(value: Any) -> str:
    return next((name for kind, name in _TYPES if isinstance(value, kind)), "null")


def to_json(text: str, types: frozenset[str]) -> str:
    """A value as JSON. The model's own text where it is JSON of one of the types, else a string."""
    value = text.strip(" \t\r\n")
    value = value if value not in _PYTHON_WORDS or ("string" in types and types != _ALL) else _PYTHON_WORDS[value]
    if is_json(value) and _json_type(value) in _with_integers(types):
        # A quoted text for a parameter that may be a string or something else is that text, quotes included.
        if _json_type(value) != "string":
            return value
    elif (types & {"object", "array"}) and value[:1] in ("{", "["):
        python = python_to_json(value)
        if python is not None:
            return python
    if value.lower() in ("true", "false") and "boolean" in types and "string" not in types:
        return value.lower()
    if "string" not in types and is_json(value):
        return value
    return f'"{string_piece(text)}"'


def _with_integers(types: frozenset[str]) -> frozenset[str]:
    return types | {"number"} if "integer" in types else types


def _json_type(value: str) -> str:
    return _FIRST_CHARS.get(value[0], "number")


def python_to_json(text: str) -> str | None:
    """A literal of Python as JSON; None if it is none. Nothing is evaluated."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
            value = ast.literal_eval(text)
        return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_SURROGATES)
    # What a model wrote may be anything, also too deep for the parser.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
