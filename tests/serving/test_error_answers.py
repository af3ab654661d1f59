"""Errors for invalid requests: actionable, short, escaped, in JSON's terms."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError

from fastserve.errors import InvalidRequestError
from fastserve.serving.errors import first_error, shown
from tests.serving.wire import Service


class Inner(BaseModel):
    count: int = Field(gt=0)


class Message(BaseModel):
    model_config = {"extra": "forbid"}

    name: str
    inner: Inner | None = None
    rows: list[int] = []


def refuse(text: str) -> InvalidRequestError:
    with pytest.raises(ValidationError) as caught:
        Message.model_validate_json(text)
    return first_error(caught.value)


@pytest.mark.parametrize(
    ("text", "words", "param"),
    [
        ("{}", "Missing required field 'name'.", "name"),
        ('{"name": null}', "Invalid value for 'name': null.", "name"),
        ('{"name": true}', "Invalid value for 'name': true.", "name"),
        ('{"name": [1, 2]}', "Invalid value for 'name': an array of 2 values.", "name"),
        ('{"name": {"a": 1}}', "Invalid value for 'name': an object of 1 fields.", "name"),
        ('{"name": "a", "inner": {"count": -1}}', "Invalid value for 'inner.count': -1.", "inner.count"),
        ('{"name": "a", "other": 1}', "The field 'other' is not known.", "other"),
        ('{"name": "a"', "The request body is not valid JSON", None),
        ('{"name": "\\ud800"}', "The request body is not valid JSON: half of a surrogate pair (\\ud800 to", None),
        ('{"name": "\\udc00x"}', "The request body is not valid JSON: half of a surrogate pair (\\ud800 to", None),
        ('{"name": "a\\ud83dy"}', "The request body is not valid JSON: half of a surrogate pair (\\ud800 to", None),
    ],
)
def test_a_sentence_names_field_and_value_as_json_has_them(text: str, words: str, param: str | None) -> None:
    error = refuse(text)
    assert error.message.startswith(words)
    assert error.param == param
    assert not any(word in error.message for word in ("None", "Input should", "hex escape"))


def test_long_and_hostile_values_and_names_are_shortened_and_escaped() -> None:
    error = refuse('{"name": "a", "' + "k\\u001b[31m\\n" * 5000 + '": 1}')
    assert len(error.message) < 300
    assert error.message.isprintable()
    error = refuse('{"name": ["' + "x" * 100_000 + '"]}')
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (math.inf, "Infinity"),
        ("a\nb\x1b", '"a\\nb\\x1b"'),
        ("\ud800", '"\\ud800"'),
        (10**400, "a number of more than 70 digits"),
        (1.5, "1.5"),
    ],
)
def test_values_are_shown_as_json_has_them(value: Any, text: str) -> None:
    assert shown(value) == text


def test_an_error_for_each_of_a_million_values_is_not_written_out() -> None:
    with pytest.raises(ValidationError) as caught:
        Message.model_validate({"name": "a", "rows": ["x"] * 100_000})
    began = time.process_time()
    assert "100000 invalid values" in first_error(caught.value).message
    assert time.process_time() - began < 0.1, "nothing is built for each"


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("GET", "/nothing", "There is no route 'GET /nothing'."),
        ("POST", "/v1/nothing", "There is no route 'POST /v1/nothing'."),
        ("POST", "/v1/images/edits", "'POST /v1/images/edits' is not supported yet."),
        ("GET", "/v1/uploads/upload-abc/parts", "'GET /v1/uploads/upload-abc/parts' is not supported yet."),
        ("GET", "/" + "a" * 10_000, "There is no route 'GET /aaaaa"),
        ("GET", "/%1b%5b31m%0aforged", "There is no route 'GET /\\x1b[31m\\nforged'."),
    ],
)
def test_an_unknown_route_is_named_with_those_that_there_are(
    impatient: Service, method: str, path: str, words: str
) -> None:
    reply = impatient.ask(path, method)
    assert reply.status == 404
    message = reply.error["message"]
    assert message.startswith(words)
    assert "GET /things/{name:path}" in message
    assert ", /" not in message  # each has its method
    assert len(message) < 1000


@pytest.mark.parametrize("word", ["a" * 90_000, "\\ud800", "\\u0000\\udfff" * 5000, "\u20ac" * 20_000])
def test_no_error_repeats_what_is_long_or_cannot_be_sent(impatient: Service, word: str) -> None:
    reply = impatient.ask("/refuse", "POST", f'"{word}"'.encode())
    assert reply.status == 400
    assert "is wrong" in reply.error["message"] or len(reply.error["message"]) > 1000
    assert len(reply.error["message"]) <= 6 * 2000 + 1
    assert len(reply.body) < 50_000


def test_a_wrong_method_is_answered_with_the_right_ones(impatient: Service) -> None:
    reply = impatient.ask("/size", "DELETE")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.error["message"] == "'DELETE /size' is not possible: use POST."
