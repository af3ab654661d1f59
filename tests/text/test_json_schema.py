"""Schemas as generators of schemas write them: their grammars take the values that the schemas allow, and no others."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from fastserve.text.grammar import of_json_schema
from fastserve.text.json_schema import with_followed_keywords

BYTES = LLTokenizer("byte")
NUMBERS = {"type": "integer", "minimum": 0}


def takes(schema: dict[str, Any], value: Any) -> bool:
    matcher = LLMatcher(BYTES, of_json_schema(schema), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(json.dumps(value, ensure_ascii=False))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "allowed", "others"),
    [
        ({"type": "string", "format": "starts_with", "pattern": "^ab.*"}, ["abc"], ["b", ""]),
        ({"type": "string", "format": "cidrv4", "pattern": r"^\d{1,3}/\d$", "maxLength": 5}, ["1/2"], ["1", "1/22"]),
        ({"type": "string", "format": "date", "pattern": "^2"}, ["2020-01-31"], ["2", "1999-01-31"]),
        (
            {"propertyNames": {"type": "string"}, "type": "object", "additionalProperties": NUMBERS},
            [{"a": 1}],
            [{"a": ""}],
        ),
        (
            {"type": "object", "properties": {"x": NUMBERS}, "propertyNames": {"type": "string"}},
            [{}, {"x": 1}, {"y": None}],
            [{"x": "1"}],
        ),
        (
            {
                "type": "object",
                "propertyNames": {"enum": ["a", "b"], "type": "string"},
                "additionalProperties": {"type": "boolean"},
                "required": ["a"],
            },
            [{"a": True}, {"a": True, "b": False}],
            [{}, {"b": True}, {"a": 1}, {"a": True, "c": True}],
        ),
        (
            {"type": "object", "propertyNames": {"pattern": "^[a-c]+$"}, "additionalProperties": NUMBERS},
            [{}, {"ab": 1, "c": 2}],
            [{"d": 1}, {"a": "x"}],
        ),
        (
            {"type": "object", "propertyNames": {"minLength": 1, "maxLength": 2}},
            [{}, {"a": 1, "é\n": [2]}],
            [{"": 1}, {"abc": 1}],
        ),
        (
            {
                "anyOf": [{"type": "null"}, {"$ref": "#/$defs/t"}],
                "$defs": {"t": {"propertyNames": {"enum": ["k"]}, "type": "object"}},
            },
            [None, {"k": 1}],
            [{"l": 1}],
        ),
    ],
)
def test_keywords_that_are_said_otherwise_mean_the_same(schema: dict[str, Any], allowed: Any, others: Any) -> None:
    for value in allowed:
        jsonschema.validate(value, schema)
        assert takes(schema, value), value
    for value in others:
        assert not takes(schema, value), value


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "jwt"},
        {"propertyNames": {"enum": ["a"]}, "properties": {"b": {}}},
        {"propertyNames": {"pattern": "a", "maxLength": 2}},
        {"propertyNames": {"minLength": "1"}},
        {"propertyNames": {"not": {}}},
        {"propertyNames": {"type": "integer"}},
        {"propertyNames": {"enum": ["a", 1]}},
        {"propertyNames": False},
        {"enum": [{"format": "x", "pattern": "y"}], "default": {"propertyNames": {}}},
        {"properties": {"format": {"const": "x"}, "pattern": {}}, "required": ["format"], "not": True},
    ],
)
def test_other_schemas_stay_as_they_are(schema: dict[str, Any]) -> None:
    assert with_followed_keywords(schema) == schema
