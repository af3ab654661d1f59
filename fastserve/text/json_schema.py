"""JSON schemas in the keywords that llguidance follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DATA_KEYWORDS = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords whose value is no schema."""
MAP_KEYWORDS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""Keywords whose value is an object of schemas."""
_FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid"}
)
"""Formats that llguidance follows."""
_NO_CONDITIONS = frozenset({"type", "title", "description"})
_LENGTHS = frozenset({"minLength", "maxLength"})


def with_followed_keywords(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of the same values without some keywords that llguidance refuses.

    A `format` of another kind goes where a `pattern` beside it says what it means, as generators of schemas write it.
    `propertyNames` become `properties` or `patternProperties`.
    """
    plain = {keyword: _followed(keyword, value) for keyword, value in schema.items()}
    name_of_format = plain.get("format")
    if isinstance(name_of_format, str) and name_of_format not in _FORMATS and isinstance(plain.get("pattern"), str):
        del plain["format"]
    return _with_named_properties(plain)


def _followed(keyword: str, value: Any) -> Any:
    if keyword in DATA_KEYWORDS:
        return value
    if isinstance(value, dict):
        if keyword in MAP_KEYWORDS:
            return {name: _part(part) for name, part in value.items()}
        return with_followed_keywords(value)
    return [_part(part) for part in value] if isinstance(value, list) else value


def _part(value: Any) -> Any:
    return with_followed_keywords(value) if isinstance(value, dict) else value


def _with_named_properties(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without `propertyNames`, if that can be said otherwise."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        return schema
    conditions = names.keys() - _NO_CONDITIONS
    rest = {keyword: value for keyword, value in schema.items() if keyword != "propertyNames"}
    if not conditions:  # all names are strings
        return rest
    if "properties" in rest or "patternProperties" in rest:
        return schema
    value, enum, pattern = rest.get("additionalProperties", True), names.get("enum"), names.get("pattern")
    if conditions == {"enum"} and isinstance(enum, list) and all(isinstance(name, str) for name in enum):
        return rest | {"properties": dict.fromkeys(enum, value), "additionalProperties": False}
    if conditions <= _LENGTHS and all(type(names[limit]) is int and names[limit] >= 0 for limit in conditions):
        pattern = rf"^[\s\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    elif conditions != {"pattern"} or not isinstance(pattern, str):
        return schema
    return rest | {"patternProperties": {pattern: value}, "additionalProperties": False}
