"""What is wrong with a body is said in words that a client's author knows."""

from __future__ import annotations

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
        (b'{"model":["a"]}', "'model': it must be a string"),
        (b'{"model":"a","stream":"yes"}', "'stream': it must be true or false"),
        (b"{}", "'model'"),
    ],
)
def test_a_bad_body_is_explained_without_words_of_libraries(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as raised:
        peek(body)
    assert not any(word in raised.value.message for word in ("null", "`", "$.", "Expected", "codec"))


def test_pairs_of_surrogates_are_characters() -> None:
    assert peek(b'{"model":"\\ud83d\\ude00","stream":true}') == ("\U0001f600", True)
