"""Request bodies: strict JSON, checked against bounds before it is parsed, and validated up to the first error.

An invalid body must cost little and hold the GIL only briefly. So its brackets are counted first. Then it is split into
its fields without parsing them (at a gigabyte per second). Then the known fields are parsed, each after a check of its
size or, if it may be long, of the number of its values. Validation refuses a list by its length before it validates its
elements, and stops at the first invalid one. Errors use JSON's terms (null, true, array), not those of a library.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo
from pydantic_core import PydanticCustomError

from fastserve.errors import ContextLengthError, InvalidRequestError
from fastserve.observability.text import printable
from fastserve.serving.json_bounds import check_json_depth, outside_strings

ModelT = TypeVar("ModelT", bound=BaseModel)

LONG_FIELDS = frozenset({"messages", "prompt", "documents", "prediction"})
"""Fields whose size is bounded only by that of the body."""
_RAW_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MESSAGES = msgspec.json.Decoder(list[dict[str, Any]] | None)
"""Stops at the first element that is not an object."""
_ANYTHING = msgspec.json.Decoder()
_FIRST_IS_NOT_OBJECT = re.compile(rb"\s*+(?!\[)|\s*+\[\s*+(?!\{)")
_FIRST_IS_OBJECT = re.compile(rb"\s*+\[\s*+\{")
_NOT_STRUCTURE = bytes(code for code in range(256) if code not in b'[]{}",')
_VALUES_PER_PART = 8
"""Maximum average of JSON values in a message, content part or tool call. Most have 2 or 3, a tool call 5."""
_TYPE_MISMATCH = re.compile(
    r"Expected `(?:array \| null|object)`.*?(?:\$\[(\d+)\].*)?$|Number out of range(?: - at `\$\[(\d+)\]`)?$"
)
"""An element that is no object, or messages that are no array."""

_SHOWN_CHARS = 80
_NAME_CHARS = 80
MAX_FIELDS = 1024
"""Maximum fields of a request and of a message, including unknown ones."""
_MAX_EXPLAINED_VALUES = 16_384
"""Maximum JSON values of an invalid body that is parsed again to find the field to name in the error."""
_MAX_INTEGER = 2**64
_MAX_DIGITS = 4000
"""Maximum digits of an integer; Python itself parses 4,300."""
_FLAGS_OF_FIELDS = {
    "stop": "--max-stop-chars",
    "tools": "--max-tool-bytes",
    "functions": "--max-tool-bytes",
    "logit_bias": "--max-logit-bias",
    "stop_token_ids": "--max-stop-token-ids",
}
_TOOL_FIELDS = frozenset({"tools", "functions"})
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class RequestBounds:
    """Limits on the parts of one request, from the worker's options of the same names."""

    max_messages: int = 4096
    max_content_parts: int = 4096
    """Content parts and tool calls of all messages together."""
    max_prompts: int = 2048
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 1024
    max_logit_bias: int = 4096
    max_grammar_bytes: int = 65_536
    max_json_depth: int = 64
    max_json_containers: int = 262_144
    max_tools: int = 1024
    max_tool_bytes: int = 1_048_576
    """Length of `tools`, as JSON."""
    max_prompt_tokens: int = 2**31
    """Token ids of all prompts together: the model's context times the engine's sequences."""

    @property
    def max_field_bytes(self) -> int:
        """Maximum size of a field other than messages and prompts; large enough for all that the other bounds allow."""
        return max(
            65_536,
            self.max_grammar_bytes,
            192 * self.max_stop_chars,
            48 * self.max_logit_bias,
            24 * self.max_stop_token_ids,
        )


def invalid(name: str, value: Any, remedy: str) -> InvalidRequestError:
    """The error for an invalid value; it names the field, the value and the remedy."""
    return InvalidRequestError(f"Invalid value for '{name}': {shown(value)}. {remedy}", param=name)


def renamed(error: InvalidRequestError, names: Mapping[str, str]) -> InvalidRequestError:
    """The error for a caller who knows the field by another name. `names` maps our paths to the caller's; the longest
    that leads to the field counts.
    """
    param = error.param or ""
    known, rest = param, ""
    while known and known not in names:
        known, _, last = known.rpartition(".")
        rest = f".{last}{rest}"
    if not known:
        return error
    theirs = names[known] + rest
    message = error.message.replace(f"'{param}'", f"'{theirs}'")
    return type(error)(message, param=theirs, code=error.code)


def shown(value: Any) -> str:
    """A value for an error message: as JSON, shortened, on one line and printable."""
    if isinstance(value, str):
        text = '"' + printable(value, _SHOWN_CHARS) + '"'
    elif isinstance(value, list | tuple):
        text = "[]" if not value else f"[{shown(value[0])}]" if len(value) == 1 else f"an array of {len(value)} items"
    elif isinstance(value, dict):
        names = ", ".join(f'"{printable(str(name), 20)}"' for name in list(value)[:3])
        text = "{}" if not value else f"an object with {names}{', ...' if len(value) > 3 else ''}"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        text = "a number of more than 30 digits"
    else:
        text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARS + 3 else text[:_SHOWN_CHARS] + "…"


def read_fields(
    body: bytes, bounds: RequestBounds, known: Container[str], long: Container[str] = LONG_FIELDS
) -> dict[str, Any]:
    """Parse a body, which must be a JSON object. Fields that are not `known` are not parsed; their value is None.

    `long`: fields that may be as large as the body. Raises InvalidRequestError, which names the field if possible.
    """
    if body.count(b"[") + body.count(b"{") > bounds.max_json_containers:
        raise InvalidRequestError(
            f"The request body has more than {bounds.max_json_containers} brackets and braces "
            "(--max-json-containers). Send less in one request."
        )
    check_json_depth(body, bounds.max_json_depth)
    try:
        if not body.isascii():
            body.decode()  # checks unknown fields, too, which are not parsed
        raw = _RAW_FIELDS.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequestError("The request body is not a JSON object.") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise explain_json(body, error, "") from error
    if len(raw) > MAX_FIELDS:
        raise InvalidRequestError(f"The request has {len(raw)} fields. Send at most {MAX_FIELDS}.")
    return {
        name: _read_field(name, bytes(value), bounds, is_long=name in long) if name in known else None
        for name, value in raw.items()
    }


def _read_field(name: str, raw: bytes, bounds: RequestBounds, *, is_long: bool) -> Any:
    max_bytes = bounds.max_tool_bytes if name in _TOOL_FIELDS else bounds.max_field_bytes
    if len(raw) > max_bytes:
        if not is_long:
            flag = _FLAGS_OF_FIELDS.get(name)
            raise InvalidRequestError(
                f"Invalid value for '{name}': {printable(raw[:_SHOWN_CHARS].decode(errors='replace'))}… It has "
                f"{len(raw)} bytes; give at most {max_bytes}{f' ({flag} sets this bound)' if flag else ''}.",
                param=name,
            )
        _check_shape(name, raw, bounds)
    try:
        return (_MESSAGES if name == "messages" else _ANYTHING).decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        if (found := _TYPE_MISMATCH.match(str(error))) is not None:
            element = found[1] or found[2]
            where = name if element is None else join(name, element)
            raise InvalidRequestError(
                f"Invalid value for '{where}'. Give an {'array' if element is None else 'object'}.", param=where
            ) from error
        raise explain_json(raw, error, name) from error


def _check_shape(name: str, raw: bytes, bounds: RequestBounds) -> None:
    """Refuse messages and prompts with too many values before parsing them, which cannot be interrupted and takes a
    hundred times as long as counting."""
    if name in ("documents", "prediction", "prompts"):
        max_values = _VALUES_PER_PART * bounds.max_content_parts
        shape = _shape(raw, max_values)
        if shape.num_values > max_values or shape.num_containers > max_values // 2:
            raise InvalidRequestError(
                f"Invalid value for '{name}': it has more parts than --max-content-parts allows, which is "
                f"{bounds.max_content_parts}. Send less in one request.",
                param=name,
            )
        return
    if name == "messages" or (name == "input" and _FIRST_IS_OBJECT.match(raw)):
        max_values = _VALUES_PER_PART * (bounds.max_messages + bounds.max_content_parts)
        shape = _shape(raw, max_values)
        if shape.num_values > max_values or shape.num_containers > max_values // 2:
            if _FIRST_IS_NOT_OBJECT.match(raw):
                return  # the parser stops there and its error names the element
            raise InvalidRequestError(
                f"Invalid value for '{name}': it has more parts than {bounds.max_messages} messages (--max-messages) "
                f"with {bounds.max_content_parts} content parts (--max-content-parts) need. Send less in one request.",
                param=name,
            )
        return
    max_values = max(bounds.max_prompts, bounds.max_prompt_tokens)
    shape = _shape(raw, max_values)
    if shape.num_containers > bounds.max_prompts + 1 or shape.num_strings > bounds.max_prompts:
        raise InvalidRequestError(
            f"Invalid value for '{name}'. Send at most {bounds.max_prompts} in one request (--max-prompts).", param=name
        )
    if shape.num_values > max_values:
        raise ContextLengthError(
            f"Your {name} has {shape.num_values} token ids or more, and this server takes at most {max_values} in one "
            "request, all prompts together. Please reduce the length of the prompt.",
            param=name,
        )


@dataclass(frozen=True)
class _Shape:
    """Counts of the elements of JSON text. A count above the maximum may be any number above it."""

    num_values: int
    """Commas outside of strings, plus one."""
    num_containers: int
    num_strings: int


def _shape(raw: bytes, max_values: int) -> _Shape:
    """Count up to about `max_values` values in a few passes in C. The length of strings does not matter."""
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = raw.translate(None, _NOT_STRUCTURE)
    num_strings = structure.count(b'"') // 2
    if num_strings > 2 * max_values:  # names and values of fields
        return _Shape(num_strings, 0, num_strings)
    structure = outside_strings(structure)
    return _Shape(structure.count(b",") + 1, structure.count(b"[") + structure.count(b"{"), num_strings)


def parse_json(text: str, name: str, bounds: RequestBounds) -> Any:
    """Parse JSON text in the field `name`. Raises InvalidRequestError that names it."""
    try:
        body = text.encode()
        check_json_depth(body, bounds.max_json_depth)
        return msgspec.json.decode(body)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"Invalid value for '{name}'. {error.message}", param=name) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise invalid(name, text, "It is not valid JSON.") from error


def explain_json(body: bytes, error: Exception, name: str) -> InvalidRequestError:
    """The error for invalid JSON, which is a whole body or the value of the field `name`."""
    if isinstance(error, UnicodeDecodeError):
        return InvalidRequestError("The request body is not valid UTF-8.")
    # The API server calls this on its event loop, and each value takes time and memory.
    if _has_too_many_values(body, _MAX_EXPLAINED_VALUES):
        return InvalidRequestError(f"The request body is not valid JSON{_position(body, error)}.")
    try:
        # Python's parser accepts values that msgspec refuses, such as NaN. So the field can be named.
        value = json.loads(body, parse_int=_parse_int)
    except (ValueError, RecursionError):
        return InvalidRequestError(f"The request body is not valid JSON{_position(body, error)}.")
    found = _first_refused(value, name)
    if found is None:
        return InvalidRequestError(f"The request body is not valid JSON{_position(body, error)}.")
    where, culprit = found
    if isinstance(culprit, str):
        return invalid(
            where, culprit, "It has half of a surrogate pair (\\ud800 to \\udfff alone), which is no character."
        )
    what = "NaN" if math.isnan(culprit) else "Infinity, or a number too large,"
    return InvalidRequestError(
        f"Invalid value for '{where}': {what} is no number in JSON. Give a finite number.", param=where
    )


def _has_too_many_values(body: bytes, max_values: int) -> bool:
    """Whether a body, which may be invalid JSON, has more than about `max_values` values."""
    shape = _shape(body, max_values)
    return shape.num_values + shape.num_containers > max_values


def _parse_int(digits: str) -> float:
    """Placeholder for an integer: infinity if it has too many digits, else 0."""
    return 0.0 if len(digits) <= _MAX_DIGITS else math.inf


def _position(body: bytes, error: Exception) -> str:
    found = re.search(r"\(byte (\d+)\)", str(error))
    if found is not None:
        return f" (at byte {found[1]})"
    return ": it is empty" if not body.strip() else ": it ends too early" if "truncated" in str(error) else ""


def _first_refused(value: Any, name: str) -> tuple[str, Any] | None:
    """Name and value of the first string with a lone surrogate, or the first number that is not finite."""
    if isinstance(value, str):
        return (name or "body", value) if _SURROGATE.search(value) else None
    if isinstance(value, float):
        return None if math.isfinite(value) else (name or "body", value)
    if isinstance(value, dict):
        for key, item in value.items():
            where = join(name, key)
            if _SURROGATE.search(key):
                return where, key
            if (found := _first_refused(item, where)) is not None:
                return found
    if isinstance(value, list):
        for at, item in enumerate(value):
            if (found := _first_refused(item, join(name, at))) is not None:
                return found
    return None


def join(name: str, part: str | int) -> str:
    """The path of a part of a field, such as messages.0.role."""
    return f"{name}.{printable(str(part), _NAME_CHARS)}" if name else printable(str(part), _NAME_CHARS)


# ---- validation -------------------------------------------------------------------------------------------------


def validate(model: type[ModelT], fields: Mapping[str, Any], bounds: RequestBounds) -> ModelT:
    """Raises InvalidRequestError for the first field that is missing or invalid."""
    try:
        return model.model_validate(fields, context=bounds)
    except ValidationError as error:
        # At most one error per field: lists stop at their first invalid element.
        raise _explain(error.errors(include_url=False)[0]) from error


def bounds_of(info: ValidationInfo) -> RequestBounds:
    return info.context if isinstance(info.context, RequestBounds) else RequestBounds()


_RANGE_ERRORS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "greater than or equal to"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "less than or equal to"),
}
_TYPE_REMEDIES = {
    "string_type": "Give a string.",
    "bool_type": "Give true or false.",
    "list_type": "Give an array.",
    "dict_type": "Give an object.",
    "model_type": "Give an object.",
    "model_attributes_type": "Give an object.",
}


def _explain(problem: Mapping[str, Any]) -> InvalidRequestError:
    """Convert one of pydantic's errors; the message names the field, the value and the remedy."""
    name = ""
    for part in problem["loc"]:
        name = join(name, part)
    name = name or "body"
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "missing":
        return InvalidRequestError(f"Missing required field '{name}'.", param=name, code="missing_required_parameter")
    if kind == "ours":
        remedy = problem["msg"]
    elif kind in _RANGE_ERRORS:
        bound, relation = _RANGE_ERRORS[kind]
        remedy = f"Give a number {relation} {context[bound]}."
    elif kind == "too_short":
        remedy = f"Give at least {context['min_length']}."
    elif kind in ("string_too_short", "string_too_long"):
        bound = context.get("min_length", context.get("max_length"))
        remedy = f"Give a string of at {'least' if kind == 'string_too_short' else 'most'} {bound} characters."
    elif kind == "literal_error":
        remedy = f"Give one of {context['expected'].replace(chr(39), chr(34))}."
    else:
        remedy = _TYPE_REMEDIES.get(kind, "It is not of the right kind.")
    return invalid(name, problem["input"], remedy)


def field_error(remedy: str) -> PydanticCustomError:
    """The error for validators to raise. The final message names the field and its value before `remedy`."""
    return PydanticCustomError("ours", remedy.replace("{", "(").replace("}", ")"))


def _integer(value: Any) -> Any:
    """Refuse strings, booleans, and numbers with a point."""
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= _MAX_INTEGER:
            return value
        raise field_error("It is too large; give an integer of at most 64 bits.")
    raise field_error("Give an integer.")


def _number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= 1e300:
            return float(value)
        raise field_error("It is too large.")
    raise field_error("Give a number.")


def at_most(limit: str, noun: str) -> BeforeValidator:
    """Refuse a longer list before validating its elements. `limit`: a field of RequestBounds; `noun`: for the error."""

    def check(value: Any, info: ValidationInfo) -> Any:
        max_items = getattr(bounds_of(info), limit)
        if isinstance(value, list) and len(value) > max_items:
            flag = "--" + limit.replace("_", "-")
            raise field_error(f"Send at most {max_items} {noun} in one request ({flag}).")
        return value

    return BeforeValidator(check)


MAX_NAME_CHARS = 1024
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
"""A caller's name for something."""
Integer = Annotated[int, BeforeValidator(_integer)]
Number = Annotated[float, BeforeValidator(_number)]
Flag = Annotated[bool, Field(strict=True)]
