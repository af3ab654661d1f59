"""Errors of a request body are worded for the client's author."""

from __future__ import annotations

import tracemalloc

import pytest

from fastserve.errors import InvalidRequestError
from fastserve.gateway.peek import peek


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is empty"),
        (b'{"model":"a"', "ends too early"),
        (b'{"model":"a",}', "at byte 13"),
        (b'{"model":"\xff"}', "not valid UTF-8"),
        (b'{"messages":' + b"[" * 100_000, "nested too deep"),
        (b'{"model":"\\ud800"}', "half of a surrogate pair"),
        (b'{"model":"a","messages":[{"content":"x\\ud83dy"}]}', "half of a surrogate pair"),
        (b'{"model":"a","messages":[{"content":"\\udc00"}]}', "half of a surrogate pair"),
        (b"[1]", "must be a JSON object"),
        (b'{"model":["a"]}', r"'model': \[\"a\"\]\. Give a string"),
        (b'{"mod\\u0065l":0}', r"'model': 0\. Give a string"),
        (b'{"model":{"\\n":"' + b"x" * 100_000 + b'"}}', r"'model': \{\"\\\\n\":\"x+….* Give a string"),
        (b'{"model":"a","stream":"yes"}', r"'stream': \"yes\"\. Give true or false"),
        (b'{"model":"a","stream":1}', r"'stream': 1\. Give true or false"),
        (b'{"model":5,', "ends too early"),
        (b'{"model":5,"user":"\\ud800"}', "'user'.*half of a surrogate pair"),
        (b"{}", "'model'"),
    ],
)
def test_a_bad_body_is_explained_without_words_of_libraries(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as raised:
        peek(body)
    assert not any(word in raised.value.message for word in ("null", "`", "$.", "Expected", "codec"))
    assert len(raised.value.message) < 300


def test_pairs_of_surrogates_are_characters() -> None:
    assert peek(b'{"model":"\\ud83d\\ude00","stream":true}') == ("\U0001f600", True)


MANY = 2**20


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model":"a","messages":[' + b"0," * MANY + b"NaN]}", id="numbers before one that is none"),
        pytest.param(
            b'{"model":"a","messages":[' + b"1.5," * MANY + b"-Infinity]}", id="floats before one that is none"
        ),
        pytest.param(b'{"model":"a","messages":[' + b"[]," * MANY, id="arrays without an end"),
        pytest.param(b'{"model":"a","messages":[' + b"{}," * MANY, id="objects without an end"),
        pytest.param(b'{"model":"a","messages":[' + b'"",' * MANY + b'"\\ud800"]}', id="strings before half a pair"),
        pytest.param(b'{"model":"a",' + b'"b":0,' * MANY + b'"c":NaN}', id="fields before a number that is none"),
    ],
)
def test_a_large_body_that_is_no_json_costs_little(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError, match="not valid JSON"):
            peek(body)
        # If the values were built, they would take more memory, and block the event loop for seconds.
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ['a, b, [c] {d}, \\"e\\", ' * 20_000, "\\\\" * 200_000], ids=["words", "backslashes"])
def test_the_field_is_named_however_long_its_text(text: str) -> None:
    body = f'{{"model":"a","messages":[{{"role":"user","content":"{text}\\ud800"}}]}}'.encode()
    with pytest.raises(InvalidRequestError, match=r"'messages\.0\.content'.*surrogate pair"):
        peek(body)
