"""Bodies with too many values are refused by counting them, without parsing them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastserve.errors import InvalidRequestError
from fastserve.openai import body as bodies
from fastserve.openai.body import RequestBounds, read_fields
from fastserve.serving.json_bounds import outside_strings

BOUNDS = RequestBounds(max_prompt_tokens=50_000)
KNOWN = {"messages", "prompt", "model"}
PIECES: dict[str, tuple[str, Any, str]] = {
    "messages without content": ("messages", [{"role": "user"}] * 60_000, "--max-messages"),
    "messages with a word": ("messages", [{"role": "user", "content": "hey"}] * 40_000, "--max-messages"),
    "parts": (
        "messages",
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * 40_000}],
        "--max-content-part",
    ),
    "numbers as content": ("messages", [{"role": "user", "content": [7] * 200_000}], "--max-content-parts"),
    "empty arrays in a message": ("messages", [{"role": "user", "x": [[]] * 100_000}], "--max-content-parts"),
    "names of fields": ("messages", [{str(i): "" for i in range(100_000)}], "--max-messages"),
    "prompts of one word": ("prompt", [["x"]] * 100_000, "--max-prompts"),
    "texts": ("prompt", ["tick"] * 100_000, "--max-prompts"),
    "arrays of token ids": ("prompt", [[1, 2]] * 50_000, "--max-prompts"),
    "token ids": ("prompt", [17] * 60_000, "at most 50000"),
    "token ids of many prompts": ("prompt", [[5] * 1000] * 70, "at most 50000"),
    "nulls": ("prompt", [None] * 70_000, "at most 50000"),
}


class NeverUsed:
    def decode(self, _: bytes) -> None:
        raise AssertionError("its values were made")


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("indent", [None, 1])
def test_too_many_values_are_counted_and_never_parsed(
    monkeypatch: pytest.MonkeyPatch, kind: str, indent: int | None
) -> None:
    name, value, words = PIECES[kind]
    body = json.dumps({"model": "m", name: value}, indent=indent).encode()
    monkeypatch.setattr(bodies, "_MESSAGES", NeverUsed())
    # The other fields, such as the model's name, are parsed.
    monkeypatch.setattr(bodies, "_ANYTHING", NeverUsed())
    with pytest.raises(InvalidRequestError, match=words) as caught:
        read_fields(body, BOUNDS, KNOWN - {"model"})
    assert caught.value.param == name


def test_bodies_within_the_bounds_are_parsed_whatever_their_strings_hold() -> None:
    texts = ['a "quoted" [bracket], {brace}', "\\", '\\"', ",,,,", '""', "back\\\\slash\\", "[[[[", "é" * 50_000, "x,"]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": texts[i % len(texts)]} for i in range(4)]}
        for _ in range(1000)
    ]
    body = {"messages": messages, "prompt": [[1, 2, 3]] * 2000 + [texts * 5_000][:0]}
    assert read_fields(json.dumps(body).encode(), BOUNDS, KNOWN) == body
    assert read_fields(json.dumps({"prompt": texts * 200}).encode(), BOUNDS, KNOWN) == {"prompt": texts * 200}
    flat = {"prompt": list(range(50_000))}
    assert read_fields(json.dumps(flat).encode(), BOUNDS, KNOWN) == flat
    long_text = {"prompt": "[{,\\\"'" * 100_000}
    assert read_fields(json.dumps(long_text).encode(), BOUNDS, KNOWN) == long_text


def test_token_ids_beyond_all_contexts_are_an_error_of_the_context() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_fields(json.dumps({"prompt": [1] * 90_000}).encode(), BOUNDS, KNOWN)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("value", [[0] * 300_000, [[]] * 200_000, {"a": [1] * 200_000}, [None], ["x"] * 100_000])
def test_an_invalid_first_element_is_still_named(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"Invalid value for 'messages(\.0)?'. Give an (object|array)"):
        read_fields(json.dumps({"messages": value}).encode(), BOUNDS, KNOWN)


@pytest.mark.parametrize(
    ("structure", "outside"),
    [
        (b"", b""), (b"[{}]", b"[{}]"), (b'{"":""}', b"{:}"), (b'","', b""), (b'["","[","]"]', b"[,,]"),
        (b'","""', b""), (b'["""]', b"["), (b'"""","",","', b",,"),
    ],
)  # fmt: skip
def test_structure_within_strings_is_ignored(structure: bytes, outside: bytes) -> None:
    assert outside_strings(structure) == outside
