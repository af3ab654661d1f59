from __future__ import annotations

import logging
from typing import Any

import pytest

from fastserve.text.chat_template import ChatTemplate
from fastserve.text.conversation import NO_COLON_TWO, derive_conversation
from tests.text.chat_templates import CHATML, CHATML_WITH_DEFAULT, GEMMA, LAST_ONLY, LLAMA2, LLAMA3

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = ["hello", "hi there", "what is {x}?", "seven", "and now", "nothing", "bye"]


def fastchat_prompt(record: dict[str, Any], system: str | None, turns: list[str]) -> str:
    """Render a conversation of style NO_COLON_TWO as FastChat's API server does."""
    assert record["sep_style"] == NO_COLON_TWO == 5
    message = record["system_message"] if system is None else system
    text: str = record["system_template"].format(system_message=message)
    for i, turn in enumerate(turns):
        text += record["roles"][i % 2] + turn + (record["sep"], record["sep2"])[i % 2]
    return text + str(record["roles"][1])


def chat(system: str | None, turns: list[str]) -> list[dict[str, Any]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


@pytest.mark.parametrize("source", [CHATML, CHATML_WITH_DEFAULT, LLAMA2, LLAMA3])
@pytest.mark.parametrize("system", [None, "Be {brief}."])
@pytest.mark.parametrize("num_turns", [1, 3, 5, 7])
def test_fastchats_prompt_is_the_templates(
    source: str, system: str | None, num_turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    template = ChatTemplate({"default": source}, TOKENS)
    conversation = derive_conversation("m", template, (2,))
    assert not caplog.records
    prompt = fastchat_prompt(conversation.as_dict(), system, TURNS[:num_turns])
    assert conversation.restore(prompt) == template.render(chat(system, TURNS[:num_turns]))


@pytest.mark.parametrize(
    ("source", "system"), [(CHATML, "x"), (CHATML_WITH_DEFAULT, None), (CHATML_WITH_DEFAULT, "x"), (LLAMA3, "x")]
)
def test_common_templates_need_no_correction(source: str, system: str | None) -> None:
    template = ChatTemplate({"default": source}, TOKENS)
    conversation = derive_conversation("m", template, ())
    prompt = fastchat_prompt(conversation.as_dict(), system, TURNS[:3])
    assert prompt == conversation.restore(prompt) == template.render(chat(system, TURNS[:3]))


def test_the_record_has_fastchats_fields() -> None:
    record = derive_conversation("m", ChatTemplate({"default": CHATML}, TOKENS), (2, 3)).as_dict()
    assert list(record) == [
        *("name", "system_template", "system_message", "system_message_vision", "roles", "messages", "offset"),
        *("sep_style", "sep", "sep2", "stop_str", "stop_token_ids", "max_image_size_mb"),
    ]
    assert record["roles"] == ["user\n", "assistant\n"]
    assert record["stop_token_ids"] == [2, 3]


def test_a_template_without_system_puts_it_first(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate({"default": GEMMA}, TOKENS)
    conversation = derive_conversation("m", template, ())
    assert "takes no system message" in caplog.text
    prompt = conversation.restore(fastchat_prompt(conversation.as_dict(), None, TURNS[:3]))
    assert prompt == template.render(chat(None, TURNS[:3]))
    prompt = conversation.restore(fastchat_prompt(conversation.as_dict(), "Be brief.", TURNS[:1]))
    assert prompt == template.render(chat(None, ["Be brief.\n\n" + TURNS[0]]))


def test_an_inexpressible_template_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        conversation = derive_conversation("m", ChatTemplate({"default": LAST_ONLY}, TOKENS), ())
    assert "cannot be expressed for FastChat" in caplog.text
    assert fastchat_prompt(conversation.as_dict(), None, ["a", "b", "c"]) == "a\nb\nc\n"
    assert derive_conversation("m", None, ()).as_dict()["sep"] == "\n"
