from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastserve.errors import InvalidRequestError, StartupError
from fastserve.text.chat_template import ChatTemplate, RenderedTooLongError, load_chat_template
from tests.text import tiny_tokenizers as tiny
from tests.text.chat_templates import CHATML, GEMMA, LLAMA2, TOOLS, WITH_FEATURES

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " two words? \n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b {{ x }} <é>"},
        {"role": "user", "content": "c"},
    ],
]
TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tiny.byte_level(), **TOKENS)


@pytest.mark.parametrize("source", [CHATML, LLAMA2, TOOLS, WITH_FEATURES])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_renders_as_transformers_does(
    reference: PreTrainedTokenizerFast, source: str, add_generation_prompt: bool, tools: Any
) -> None:
    template = ChatTemplate({"default": source}, TOKENS)
    for chat in CHATS:
        expected = reference.apply_chat_template(
            chat, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert template.render(chat, tools=tools, add_generation_prompt=add_generation_prompt) == expected


def test_tool_messages_and_nulls(reference: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]
    expected = reference.apply_chat_template(chat, chat_template=TOOLS, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate({"default": TOOLS}, TOKENS).render(chat) == expected
    assert '"arguments": {"a": 1}' in expected


def test_calls_without_content_where_the_template_knows_no_tools() -> None:
    source = "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]
    assert ChatTemplate({"default": source}, TOKENS).render(chat) == "<user>1+1<assistant><tool>2"
    with pytest.raises(InvalidRequestError, match="no attribute 'weather'"):
        ChatTemplate({"default": source + "{{ messages[0].weather + 'x' }}"}, TOKENS).render(chat)


def test_a_refusal_is_the_clients_error() -> None:
    template = ChatTemplate({"default": GEMMA}, TOKENS)
    with pytest.raises(InvalidRequestError, match="System role not supported") as caught:
        template.render([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    assert caught.value.param == "messages"


def test_templates_cannot_leave_the_sandbox() -> None:
    template = ChatTemplate({"default": "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"}, {})
    with pytest.raises(InvalidRequestError):
        template.render([{"role": "user", "content": "x"}])


def test_sources_of_the_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert load_chat_template(tmp_path) is None

    def config(**content: Any) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))

    config(chat_template="plain {{ bos_token }}", bos_token={"content": "<s>"})
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(chat) == "plain <s>"

    named = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "for tools"}]
    config(chat_template=named)
    template = load_chat_template(tmp_path)
    assert template is not None
    assert (template.render(chat), template.render(chat, tools=[TOOL])) == ("listed", "for tools")

    (tmp_path / "chat_template.jinja").write_text("from a file\n")
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(chat) == "from a file"

    own = tmp_path / "own.jinja"
    own.write_text("own")
    template = load_chat_template(tmp_path, own)
    assert template is not None
    assert template.render(chat) == "own"
    with pytest.raises(StartupError, match=r"missing\.jinja"):
        load_chat_template(tmp_path, tmp_path / "missing.jinja")
    own.write_text("{% if %}")
    with pytest.raises(StartupError, match="line 1"):
        load_chat_template(tmp_path, own)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",  # undefined
        "{{ 1 // 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 2.0 ** 100000 }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
        "{{ messages[0].content.encode('ascii') }}",
        "{{ '%d' % 'x' }}",
        "{{ raise_exception('no \\x1b[31m such role') }}",
        "{{ strftime_now(messages) }}",
        "{{ messages | tojson(indent=messages) }}",
        "{{ namespace(1, 2) }}",
        "{{ (messages[0].content * 3)[5:1:0] }}",
    ],
)
def test_whatever_a_template_fails_with_is_the_clients_error(source: str) -> None:
    template = ChatTemplate({"default": source}, TOKENS)
    with pytest.raises(InvalidRequestError, match=r"could not render these messages: \S") as caught:
        template.render([{"role": "user", "content": "naïve"}])
    assert caught.value.param == "messages"
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_a_template_is_stopped_at_its_length_and_time_limits() -> None:
    endless = "{% for i in range(9999) %}{% for k in range(9999) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
    template = ChatTemplate({"default": endless}, TOKENS)
    chat = [{"role": "user", "content": "abc"}]
    with pytest.raises(RenderedTooLongError) as caught:
        template.render(chat, max_chars=10_000)
    assert 10_000 < caught.value.num_chars < 10_010
    with pytest.raises(InvalidRequestError, match="--template-timeout-s"):
        template.render(chat, timeout_s=0.05)
