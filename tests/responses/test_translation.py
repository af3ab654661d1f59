"""Responses requests as chat requests, as pure functions: items, tools, formats, and the names in errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.openai.body import RequestBounds, renamed
from fastserve.openai.responses.head import ResponseHead, new_id
from fastserve.openai.responses.request import read_request
from fastserve.openai.responses.translate import ChatFields, to_chat

HEAD = ResponseHead(new_id("resp"), 1, is_stored=True)
BOUNDS = RequestBounds(max_messages=50, max_content_parts=60)
FUNCTION = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object"}}
PATCH: dict[str, Any] = {
    "type": "custom",
    "name": "patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x+/"},
}
NESTED = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}},
}


def translate(head: ResponseHead | None = HEAD, **fields: Any) -> ChatFields:
    body = json.dumps({"model": "m", "input": "hi", **fields}).encode()
    return to_chat(read_request(body, BOUNDS), BOUNDS, head)


AGENT_TURN: list[Any] = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment>"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
    {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "ls"}],
        "encrypted_content": None,
    },
    {"type": "function_call", "name": "look", "arguments": '{"cmd":["ls"]}', "call_id": "call_1", "id": "fc_1"},
    {"type": "function_call", "name": "look", "arguments": "{}", "call_id": "call_2"},
    {"type": "function_call_output", "call_id": "call_1", "output": "a.txt"},
    {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "none"}]},
    {"type": "custom_tool_call", "name": "patch", "input": "*** x", "call_id": "call_3"},
    {"type": "custom_tool_call_output", "call_id": "call_3", "output": "done"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One file."}]},
    {"role": "user", "content": "Thanks."},
]


def test_a_turn_of_a_coding_agent_becomes_a_chat() -> None:
    """The shape of Codex's requests."""
    made = translate(
        instructions="You are an agent.",
        input=AGENT_TURN,
        tools=[FUNCTION | {"strict": False}, PATCH, {"type": "web_search", "external_web_access": False}],
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        stream=True,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="0199",
        text={"verbosity": "low"},
        client_metadata={"x": "y"},
    )
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "look", "arguments": arguments}}
        for number, arguments in ((1, '{"cmd":["ls"]}'), (2, "{}"))
    ]
    patch = {"id": "call_3", "type": "function", "function": {"name": "patch", "arguments": {"input": "*** x"}}}
    assert made.fields["messages"] == [
        {"role": "system", "content": "You are an agent.\n\n<permissions>"},
        {"role": "user", "content": "<environment>"},
        {"role": "user", "content": "List the files."},
        {"role": "assistant", "content": None, "reasoning_content": "ls", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "a.txt"},
        {"role": "tool", "tool_call_id": "call_2", "content": "none"},
        {"role": "assistant", "content": None, "tool_calls": [patch]},
        {"role": "tool", "tool_call_id": "call_3", "content": "done"},
        {"role": "assistant", "content": "One file."},
        {"role": "user", "content": "Thanks."},
    ]
    look, custom = made.fields["tools"]
    assert look == {"type": "function", "function": NESTED["function"] | {"strict": False}}  # type: ignore[operator]
    assert "start: /x+/" in custom["function"]["description"]
    assert custom["function"]["parameters"]["required"] == ["input"]
    assert made.custom_tools == {"patch"}
    assert [tool["type"] for tool in made.tools] == ["function", "custom"]
    assert made.fields["tool_choice"] == "auto"
    assert made.fields["parallel_tool_calls"] is False
    assert made.fields["reasoning_effort"] == "medium"


@pytest.mark.parametrize(
    ("given", "chat"),
    [
        ({}, {}),
        ({"tool_choice": "none"}, {}),
        ({"tools": [{"type": "web_search"}], "tool_choice": "auto"}, {}),
        ({"tools": [FUNCTION], "tool_choice": "required"}, {"tools": [NESTED], "tool_choice": "required"}),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "look"}},
            {"tools": [NESTED], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        ),
        (
            {
                "tools": [FUNCTION],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "look"}, {"type": "web_search"}],
                },
            },
            {
                "tools": [NESTED],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "look"}}],
                    },
                },
            },
        ),
        ({"text": {"format": {"type": "text"}}}, {"response_format": {"type": "text"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
        ({"max_output_tokens": 16, "top_k": 5, "seed": 1}, {"max_completion_tokens": 16, "top_k": 5, "seed": 1}),
        ({"surprise": {"a": 1}}, {"surprise": None}),
    ],
)
def test_fields_become_those_of_a_chat(given: dict[str, Any], chat: dict[str, Any]) -> None:
    always = {"model", "messages", "stream", "temperature", "top_p", "parallel_tool_calls", "max_completion_tokens"}
    fields = translate(**given).fields
    assert {name: value for name, value in fields.items() if name not in always or name in chat} == chat


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": {"role": "user"}}, "input"),
        ({"input": ["hi"]}, "input.0"),
        ({"input": [None]}, "input.0"),
        ({"input": [{"role": "user", "content": "x"}] * 51}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}] * 61}]}, "input.0.content"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": ["user"], "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": 1e300}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": ["x"]}]}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": {}}]}, "input.0.arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input.0.output"),
        ({"input": [{"type": "reasoning", "content": [{"type": "code"}]}]}, "input.0.content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "mcp_call"}]}, "input.0.type"),
        ({"input": [{"type": 5}]}, "input.0.type"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 15}, "max_output_tokens"),
        ({"max_output_tokens": "16"}, "max_output_tokens"),
        ({"max_tokens": 16}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"response_format": {}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": "x"}}, "stream_options.include_obfuscation"),
        ({"include": "all"}, "include"),
        ({"include": ["everything"]}, "include.0"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"metadata": {str(number): "b" for number in range(17)}}, "metadata"),
        ({"truncation": "auto"}, "truncation"),
        ({"truncation": "some"}, "truncation"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": "high"}, "reasoning"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"verbosity": "chatty"}}, "text.verbosity"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"background": True, "store": False}, "background"),
        ({"tools": {}}, "tools"),
        ({"tools": ["x"]}, "tools.0"),
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [{"type": "functoin"}]}, "tools.0.type"),
        ({"tools": [FUNCTION, {"type": "mcp", "server_url": "http://x"}]}, "tools.1"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools.0"),
        ({"tools": [PATCH | {"format": {"type": "grammar"}}]}, "tools.0.format"),
        ({"tools": [PATCH | {"format": "text"}]}, "tools.0.format"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "look"}}, "tool_choice.name"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "custom", "name": "look"}}, "tool_choice.name"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice.tools"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "x"}}, "tool_choice.mode"),
    ],
)
def test_malformed_fields_are_named_with_value_and_remedy(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        translate(**fields)
    assert refused.value.param == param
    assert f"'{param}'" in refused.value.message
    assert refused.value.message.endswith(".")


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "background"])
def test_a_worker_without_an_api_server_refuses_what_needs_a_store(name: str) -> None:
    with pytest.raises(UnsupportedParameterError) as refused:
        translate(None, **{name: True if name == "background" else "id_1"})
    assert refused.value.param == name
    assert "--responses-store" in refused.value.message


def test_errors_of_the_chat_have_the_names_of_the_request() -> None:
    made = translate(input=AGENT_TURN, instructions="x", tools=[{"type": "web_search"}, FUNCTION])
    for ours, theirs in {
        "messages": "input",
        "messages.3.tool_calls.1.function.arguments": "input.5.arguments",
        "messages.4.tool_call_id": "input.6.call_id",
        "messages.5.content": "input.7.output",
        "messages.9.content": "input.11.content",
        "tools.0.function.parameters.x": "tools.1.parameters.x",
        "response_format.json_schema.schema": "text.format.schema",
        "max_completion_tokens": "max_output_tokens",
        "temperature": "temperature",
    }.items():
        error = renamed(InvalidRequestError(f"Invalid value for '{ours}': 5.", param=ours), made.names)
        assert (error.param, error.message) == (theirs, f"Invalid value for '{theirs}': 5.")


def test_items_of_earlier_responses_have_no_numbers_in_errors() -> None:
    bad: list[Any] = [
        {"role": "user", "content": "x"},
        {"role": "user", "content": "x"},
        {"role": "user", "content": 5},
    ]
    head = ResponseHead(new_id("resp"), 1, num_prior_items=2)
    with pytest.raises(InvalidRequestError) as refused:
        translate(head, input=bad)
    assert refused.value.param == "input.0.content"
