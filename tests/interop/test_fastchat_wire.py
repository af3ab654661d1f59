"""FastChat's protocol on our processes, with the messages that FastChat's own programs send and read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastserve.demo import demo_model_path
from fastserve.text.chat_template import ChatTemplate, load_chat_template
from fastserve.text.load_tokenizer import load_tokenizer

from .conftest import MODEL

NO_COLON_TWO = 5
CHATS: dict[str, list[dict[str, str]]] = {
    "question": [{"role": "user", "content": "What is 7 + 5?"}],
    "system": [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "What is 7 + 5?"}],
    "turns": [
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": "What is 7 + 5?"},
    ],
}
chats = pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    template = load_chat_template(Path(demo_model_path()))
    assert template is not None
    return template


def conversation(worker: str) -> dict[str, Any]:
    answer = httpx.post(f"{worker}/worker_get_conv_template", json={"model": MODEL}).raise_for_status().json()
    conv: dict[str, Any] = answer["conv"]
    return conv


def by_the_rule(conv: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """The prompt that FastChat's API server makes for a conversation of the style NO_COLON_TWO."""
    assert conv["sep_style"] == NO_COLON_TWO
    said = [message["content"] for message in messages if message["role"] == "system"]
    prompt: str = conv["system_template"].format(system_message=said[-1] if said else conv["system_message"])
    turns = [message for message in messages if message["role"] != "system"]
    for number, turn in enumerate(turns):
        prompt += conv["roles"][number % 2] + turn["content"] + (conv["sep"], conv["sep2"])[number % 2]
    return prompt + str(conv["roles"][1])


def read_stream(controller: str, **params: Any) -> list[dict[str, Any]]:
    """The records of a generation through the controller, split at the NUL bytes."""
    rest, records = b"", []
    body = {"model": MODEL, "temperature": 0, "max_new_tokens": 64, "echo": False} | params
    with httpx.stream("POST", f"{controller}/worker_generate_stream", json=body, timeout=60) as response:
        assert response.status_code == 200
        for piece in response.iter_bytes():
            *whole, rest = (rest + piece).split(b"\0")
            records += [json.loads(record) for record in whole]
    assert rest == b""
    return records


@chats
def test_a_prompt_by_fastchats_rule_is_answered_as_a_chat(
    worker: str, template: ChatTemplate, messages: list[dict[str, str]]
) -> None:
    prompt = by_the_rule(conversation(worker), messages)
    record = httpx.post(
        f"{worker}/worker_generate", json={"prompt": prompt, "temperature": 0, "echo": False}, timeout=60
    ).json()
    chat = {"model": MODEL, "temperature": 0, "messages": messages}
    expected = httpx.post(f"{worker}/v1/chat/completions", json=chat, timeout=60).raise_for_status().json()
    assert record["text"] == expected["choices"][0]["message"]["content"]
    assert record["usage"].items() <= expected["usage"].items()
    if messages[0]["role"] == "system":
        # Without a system message the prompt has an empty one, which the worker removes.
        assert prompt == template.render(messages)


def test_the_controller_relays_a_stream_of_whole_texts(controller: str, worker: str, template: ChatTemplate) -> None:
    records = read_stream(controller, prompt=template.render(CHATS["question"]))
    texts = [record["text"] for record in records]
    assert texts[-1] == "12"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [record["finish_reason"] for record in records] == [None] * (len(records) - 1) + ["stop"]
    assert {record["error_code"] for record in records} == {0}


def test_stop_ids_of_another_vocabulary_have_no_effect(controller: str, worker: str, template: ChatTemplate) -> None:
    prompt = template.render(CHATS["question"])
    _, two = load_tokenizer(Path(demo_model_path())).encode("12", add_special_tokens=False)
    foreign = [151643, -1]
    assert read_stream(controller, prompt=prompt, stop_token_ids=foreign)[-1]["text"] == "12"
    assert read_stream(controller, prompt=prompt, stop_token_ids=[*foreign, two])[-1]["text"] == "1"


def test_errors_are_single_records(controller: str, worker: str) -> None:
    (no_worker,) = read_stream(controller, model="nobody", prompt="x")
    assert no_worker["error_code"] == 50005
    (too_long,) = read_stream(controller, prompt="hello " * 3000)
    assert too_long["error_code"] == 40303
    assert "2048" in too_long["text"]
