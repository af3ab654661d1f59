"""Fields that say what an answer must look like: OpenAI's, vLLM's, llama.cpp's and SGLang's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.openai.body import RequestBounds, invalid, parse_json

FormatKind = Literal["json_schema", "regex", "choice", "grammar"]
_RESPONSE_FORMATS = '"text", "json_object" or "json_schema"'
_STRUCTURED_FIELDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_MAX_CHOICES = 4096


@dataclass(frozen=True)
class AnswerFormat:
    """The format that a request asks for."""

    kind: FormatKind
    value: Any
    """A schema (object or boolean), a regular expression, texts to choose from, or a grammar in Lark or GBNF."""
    param: str
    """Path of the value in the request, for errors."""
    whitespace_pattern: str | None = None
    """Regular expression of whitespace in JSON; empty: none; None: the default."""


class StructuredFields(BaseModel):
    """At most one of them may ask for a format."""

    response_format: dict[str, Any] | None = None
    """OpenAI's: `{"type": "text"}`, `{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": {"name": ...,
    "schema": ...}}`. The schema is always followed, with `strict` or without."""
    structured_outputs: dict[str, Any] | None = None
    """vLLM's: an object with one of `json`, `regex`, `choice`, `grammar`, `json_object`, and optionally
    `whitespace_pattern` or `disable_any_whitespace`."""
    guided_json: Any = None
    """JSON schema that the answer follows: an object, or its text."""
    guided_regex: str | None = None
    """Regular expression that the whole answer matches."""
    guided_choice: list[Any] | None = None
    """Texts, one of which is the answer."""
    guided_grammar: str | None = None
    """Grammar that the answer follows, in Lark or GBNF."""
    guided_whitespace_pattern: str | None = None
    """With guided_json: regular expression of the whitespace between its tokens."""
    grammar: str | None = None
    """The same as guided_grammar (llama.cpp's name)."""
    json_schema: Any = None
    """The same as guided_json (llama.cpp's and SGLang's name)."""
    regex: str | None = None
    """The same as guided_regex (SGLang's name)."""
    ebnf: str | None = None
    """The same as guided_grammar (SGLang's name)."""

    def answer_format(self, bounds: RequestBounds) -> AnswerFormat | None:
        """The format that the request asks for; None: any text. Raises InvalidRequestError."""
        whitespace = self.guided_whitespace_pattern
        found = [
            _response_format(self.response_format),
            _structured_outputs(self.structured_outputs),
            _plain("json_schema", self.guided_json, "guided_json", whitespace),
            _plain("regex", self.guided_regex, "guided_regex"),
            _plain("choice", self.guided_choice, "guided_choice"),
            _plain("grammar", self.guided_grammar, "guided_grammar"),
            _plain("grammar", self.grammar, "grammar"),
            _plain("json_schema", self.json_schema, "json_schema"),
            _plain("regex", self.regex, "regex"),
            _plain("grammar", self.ebnf, "ebnf"),
        ]
        formats = [item for item in found if item is not None]
        if len(formats) > 1:
            first, second = formats[0].param, formats[1].param
            raise InvalidRequestError(
                f"'{first}' and '{second}' both say what the answer must look like. Give one of them.", param=second
            )
        if whitespace is not None and self.guided_json is None:
            raise invalid("guided_whitespace_pattern", whitespace, "It needs guided_json.")
        return _checked(formats[0], bounds) if formats else None


def _plain(kind: FormatKind, value: Any, param: str, whitespace: str | None = None) -> AnswerFormat | None:
    return None if value is None else AnswerFormat(kind, value, param, whitespace)


def _response_format(value: Mapping[str, Any] | None) -> AnswerFormat | None:
    if value is None:
        return None
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
        return AnswerFormat("json_schema", {"type": "object"} if schema is None else schema, "response_format.schema")
    if kind == "json_schema":
        named = value.get("json_schema")
        if named is None and value.get("schema") is not None:  # llama.cpp's form
            return AnswerFormat("json_schema", value["schema"], "response_format.schema")
        if not isinstance(named, dict):
            raise invalid("response_format.json_schema", named, 'Give an object with "name" and "schema".')
        for field, kind_of, remedy in (("name", str, "Give a string."), ("strict", bool, "Give true or false.")):
            if named.get(field) is not None and not isinstance(named[field], kind_of):
                raise invalid(f"response_format.json_schema.{field}", named[field], remedy)
        schema = named.get("schema")
        if schema is None:
            raise invalid("response_format.json_schema.schema", None, "Give a JSON schema.")
        return AnswerFormat("json_schema", schema, "response_format.json_schema.schema")
    if kind in ("structural_tag", "grammar", "regex"):
        raise UnsupportedParameterError(
            f"'response_format.type' \"{kind}\" is not supported. Give {_RESPONSE_FORMATS}, or structured_outputs.",
            param="response_format.type",
        )
    raise invalid("response_format.type", kind, f"Give {_RESPONSE_FORMATS}.")


def _structured_outputs(value: Mapping[str, Any] | None) -> AnswerFormat | None:
    if value is None:
        return None
    whitespace = value.get("whitespace_pattern")
    if whitespace is not None and not isinstance(whitespace, str):
        raise invalid("structured_outputs.whitespace_pattern", whitespace, "Give a regular expression.")
    for field in ("disable_any_whitespace", "disable_fallback", "disable_additional_properties"):
        if value.get(field) is not None and not isinstance(value[field], bool):
            raise invalid(f"structured_outputs.{field}", value[field], "Give true or false.")
    if value.get("disable_additional_properties"):
        raise UnsupportedParameterError(
            "'structured_outputs.disable_additional_properties' is not supported. Write additionalProperties: false in "
            "the schema.",
            param="structured_outputs.disable_additional_properties",
        )
    given = [field for field in _STRUCTURED_FIELDS if value.get(field) is not None]
    if len(given) != 1:
        remedy = f"Give one of {', '.join(_STRUCTURED_FIELDS)}" + (f", not {' and '.join(given)}." if given else ".")
        raise invalid("structured_outputs", value, remedy)
    [field] = given
    param = f"structured_outputs.{field}"
    if field == "structural_tag":
        raise UnsupportedParameterError(f"'{param}' is not supported. Give json, regex or a grammar.", param=param)
    whitespace = "" if value.get("disable_any_whitespace") else whitespace
    if field == "json_object":
        if value[field] is not True:
            raise invalid(param, value[field], "Give true, or leave it out.")
        return AnswerFormat("json_schema", {"type": "object"}, param, whitespace)
    kinds: dict[str, FormatKind] = {
        "json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"
    }  # fmt: skip
    return AnswerFormat(kinds[field], value[field], param, whitespace)


def _checked(wanted: AnswerFormat, bounds: RequestBounds) -> AnswerFormat:
    """The format with a value of the right type; a schema that was given as text is read."""
    value, param = wanted.value, wanted.param
    if wanted.kind == "json_schema":
        if isinstance(value, str):
            value = parse_json(value, param, bounds)
        if not isinstance(value, dict | bool):
            raise invalid(param, value, "Give a JSON schema, which is an object.")
        return AnswerFormat("json_schema", value, param, wanted.whitespace_pattern)
    if wanted.kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise invalid(param, value, "Give an array of strings, none of them empty.")
        if len(value) > _MAX_CHOICES:
            raise invalid(param, value, f"Give at most {_MAX_CHOICES}.")
    elif not isinstance(value, str) or not value:
        raise invalid(param, value, "Give a string that is not empty.")
    return wanted
