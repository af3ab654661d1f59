"""Requests of other APIs in the fields of a chat request, and answers of parts in their shapes. No server."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import anthropic
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import FastserveError, InvalidRequestError, NoWorkerError
from fastserve.openai.answers import Usage
from fastserve.openai.anthropic import MessagesRequest
from fastserve.text.parts import Part, ReasoningPart, TextPart, ToolCallPart
from fastserve.worker.anthropic_request import MessagesJob, to_chat
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.ollama_request import chat_messages
from fastserve.worker.results import ChoiceResult, JobResult
from fastserve.worker.writers.anthropic import AnthropicWriter, event
from fastserve.worker.writers.ollama import OllamaWriter, chat_shape, generate_shape

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TURN: anthropic.types.MessageParam = {"role": "user", "content": "hi"}


def fields_of(**more: Any) -> dict[str, Any]:
    return dict(to_chat(MessagesRequest(**{"model": "m", "max_tokens": 5, "messages": [TURN], **more})).fields)


# ---- requests of Anthropic's clients ----------------------------------------------------------------------------


def test_turns_with_tools_become_messages_of_a_chat() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "22"}]}
    messages = fields_of(
        system="be kind",
        messages=[
            TURN,
            {"role": "assistant", "content": [thought, {"type": "text", "text": "Let me see."}, call]},
            {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
            {"role": "assistant", "content": [call | {"id": "toolu_2", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True}]},
        ],
    )["messages"]
    assert [message["role"] for message in messages] == [
        *("system", "user", "assistant", "tool", "user", "assistant", "tool")
    ]
    assert messages[2] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "Let me see."}],
        "tool_calls": [
            {
                "id": "toolu_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
            }
        ],
        "reasoning_content": "hm",
    }
    assert messages[3] == {"role": "tool", "content": [{"type": "text", "text": "22"}], "tool_call_id": "toolu_1"}
    assert messages[5]["content"] is None
    assert messages[6]["content"] == [{"type": "text", "text": "Error:"}]


def test_the_answer_goes_on_with_a_last_turn_of_the_assistant() -> None:
    assert "continue_final_message" not in fields_of()
    fields = fields_of(messages=[TURN, {"role": "assistant", "content": "The answer is"}])
    assert (fields["continue_final_message"], fields["add_generation_prompt"]) == (True, False)


def test_texts_of_documents_and_search_results_are_kept() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "d"}
    found = {"type": "search_result", "title": "t", "source": "s", "content": [{"type": "text", "text": "c"}]}
    blocks = [{"type": "document", "title": "n", "source": source}, found]
    (message,) = fields_of(messages=[{"role": "user", "content": blocks}])["messages"]
    assert [part["text"] for part in message["content"]] == ["n", "d", "t", "s", "c"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ],
)
def test_tools_and_their_choice(given: dict[str, Any], expected: Any) -> None:
    tools = [{"name": "weather", "description": "d", "input_schema": SCHEMA, "strict": True, "cache_control": {}}]
    fields = fields_of(tools=tools, tool_choice=given | {"disable_parallel_tool_use": True})
    function = {"name": "weather", "parameters": SCHEMA, "description": "d", "strict": True}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert (fields["tool_choice"], fields["parallel_tool_calls"]) == (expected, False)


def test_a_schema_without_properties_or_type_is_one_of_any_object() -> None:
    (tool,) = fields_of(tools=[{"name": "f", "input_schema": {}}])["tools"]
    assert tool["function"]["parameters"] == {"type": "object"}


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ({"type": "adaptive"}, {}),
        ({"type": "disabled"}, {"chat_template_kwargs": {"enable_thinking": False}}),
        (
            {"type": "enabled", "budget_tokens": 1024},
            {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 1024},
        ),
    ],
)
def test_thinking_and_its_budget(thinking: dict[str, Any], expected: dict[str, Any]) -> None:
    fields = fields_of(thinking=thinking)
    assert {name: fields[name] for name in fields if name not in ("model", "messages")} == expected


def test_the_form_of_the_output_and_the_effort() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    fields = fields_of(output_config={"effort": "low", "format": form})
    assert (fields["reasoning_effort"], fields["response_format"]) == ("low", named)
    assert fields_of(output_format=form)["response_format"] == named


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "id", "x"]), inner),
    max_leaves=8,
)


@given(st.sampled_from(["messages", "system", "tools", "tool_choice", "thinking", "output_config"]), JSON)
def test_whatever_a_field_holds_is_translated_or_refused_by_name(name: str, value: Any) -> None:
    """Values that the schema lets through."""
    if name in ("messages", "tools"):
        value = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
        value = value or [TURN]
    elif name == "system":
        value = value if isinstance(value, list) else str(value)
    elif not isinstance(value, dict):
        value = {"type": value}
    refused = None
    try:
        to_chat(MessagesRequest.model_construct(**{"model": "m", "messages": [TURN], name: value}))
    except InvalidRequestError as error:
        refused = error.param
    assert refused is None or refused.startswith(name)


# ---- messages of Ollama's clients -------------------------------------------------------------------------------


def call(name: str, **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": {"a": 1}}, **more}


def test_results_find_the_calls_of_ollamas_messages() -> None:
    messages = chat_messages(
        [
            TURN,
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call("f"), call("g"), call("f")]},
            {"role": "tool", "content": "1", "tool_name": "g"},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "3", "tool_name": "f"},
            {"role": "assistant", "tool_calls": [call("f", id="mine")]},
            {"role": "tool", "content": "4", "tool_call_id": "mine"},
        ]
    )
    ids = [made["id"] for made in messages[1]["tool_calls"]]
    assert len(set(ids)) == 3
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == [
        *(ids[1], ids[0], ids[2], "mine")
    ]
    assert messages[1]["reasoning_content"] == "hm"
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}


def test_results_of_calls_without_ids_may_have_ids_of_the_clients_own() -> None:
    calls = {"role": "assistant", "tool_calls": [call("f"), call("g"), call("f", id="mine")]}
    results = [{"role": "tool", "content": given, "tool_call_id": given} for given in ("made-1", "mine", "made-2")]
    messages = chat_messages([TURN, calls, *results])
    ids = [made["id"] for made in messages[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in messages[2:]] == [ids[0], "mine", ids[1]]
    with pytest.raises(InvalidRequestError, match="result of no call"):
        chat_messages([TURN, {"role": "assistant", "tool_calls": [call("f", id="mine")]}, results[0]])


# ---- answers ----------------------------------------------------------------------------------------------------

PARTS: list[Part] = [
    ReasoningPart("I "),
    ReasoningPart("think"),
    TextPart("Let me "),
    TextPart("see."),
    ToolCallPart(0, "call_1", "weather", ""),
    ToolCallPart(0, arguments='{"city": '),
    ToolCallPart(0, arguments='"Rome"}'),
    ToolCallPart(1, "call_2", "time", "{}"),
    TextPart("Done."),
]
JOB = cast(
    Job,
    SimpleNamespace(
        caller=SimpleNamespace(request_id="r", arrived_s=0.0),
        prompt_tokens=9,
        answer=SimpleNamespace(model="m"),
    ),
)


def deltas_of(batches: Sequence[Sequence[Part]], finish_reason: str, stop: str | None = None) -> list[ChoiceDelta]:
    return [
        ChoiceDelta(
            0,
            list(parts),
            None,
            finish_reason if number == len(batches) - 1 else None,
            number + 1,
            4,
            stop_string=stop if number == len(batches) - 1 else None,
        )
        for number, parts in enumerate(batches)
    ]


def result_of(deltas: Sequence[ChoiceDelta]) -> JobResult:
    choice = ChoiceResult(0)
    for delta in deltas:
        choice.add(delta)
    usage = Usage(9, choice.num_tokens, choice.cached_tokens)
    return cast(JobResult, SimpleNamespace(runs=[choice], choices=[choice], usage=usage))


def anthropic_stream(deltas: Sequence[ChoiceDelta], **options: Any) -> list[dict[str, Any]]:
    writer = AnthropicWriter(MessagesJob(JOB, **({"max_tokens": 100, "shows_thinking": True} | options)))
    content = b"".join(writer.write([delta]) for delta in deltas)
    content += writer.end(result_of(deltas).usage)
    events = []
    for text in content.decode().strip().split("\n\n"):
        name, data = text.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        events.append(payload)
    return events


def anthropic_whole(deltas: Sequence[ChoiceDelta], **options: Any) -> dict[str, Any]:
    writer = AnthropicWriter(MessagesJob(JOB, **({"max_tokens": 100, "shows_thinking": True} | options)))
    answer: dict[str, Any] = json.loads(writer.whole(result_of(deltas)))
    return answer


def folded(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that Anthropic's client makes of a stream."""
    content = b"".join(event(payload) for payload in events)

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = anthropic.Anthropic(base_url="http://unused", api_key="none", http_client=http)
    with client.messages.stream(model="m", max_tokens=5, messages=[TURN]) as stream:
        return stream.get_final_message().to_dict()


CUTS: list[Callable[[], list[list[Part]]]] = [
    lambda: [[part] for part in PARTS],
    lambda: [list(PARTS)],
    lambda: [PARTS[:1], PARTS[1:3], PARTS[3:6], PARTS[6:]],
    lambda: [[], PARTS[:1], [], PARTS[1:], []],
]


def test_blocks_of_a_stream_never_overlap_and_fold_to_the_whole_answer() -> None:
    for cut in CUTS:
        deltas = deltas_of(cut(), "stop")
        events, opened, open_type = anthropic_stream(deltas), -1, None
        assert [payload["type"] for payload in (events[0], *events[-2:])] == [
            "message_start",
            "message_delta",
            "message_stop",
        ]
        for payload in events[1:-2]:
            if payload["type"] == "content_block_start":
                assert (open_type, payload["index"]) == (None, opened + 1)
                opened, open_type = payload["index"], payload["content_block"]["type"]
            else:
                assert payload["index"] == opened
            if payload["type"] == "content_block_delta":
                fitting = {"text": ["text_delta"], "tool_use": ["input_json_delta"]}
                allowed = fitting.get(str(open_type), ["thinking_delta", "signature_delta"])
                assert payload["delta"]["type"] in allowed
            elif payload["type"] == "content_block_stop":
                open_type = None
        assert open_type is None
        whole = anthropic_whole(deltas)
        assert whole["content"] == [
            {"type": "thinking", "thinking": "I think", "signature": ""},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}},
            {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
            {"type": "text", "text": "Done."},
        ]
        final = folded(events)
        for name in ("id", "role", "model", "stop_reason", "stop_sequence"):
            assert final[name] == whole[name]
        for left, right in zip(final["content"], whole["content"], strict=True):
            assert {key: left[key] for key in right} == right
        assert (whole["stop_reason"], whole["usage"]["input_tokens"]) == ("tool_use", 5)
        assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 4


def test_thinking_that_is_not_to_be_shown_has_empty_blocks() -> None:
    deltas = deltas_of([PARTS], "stop")
    block = {"type": "thinking", "thinking": "", "signature": ""}
    assert anthropic_whole(deltas, shows_thinking=False)["content"][0] == block
    assert "thinking_delta" not in json.dumps(anthropic_stream(deltas, shows_thinking=False))


@pytest.mark.parametrize(
    ("finish_reason", "stop", "max_tokens", "parts", "expected"),
    [
        ("stop", None, 100, [TextPart("a")], ("end_turn", None)),
        ("stop", "END", 100, [TextPart("a")], ("stop_sequence", "END")),
        ("stop", None, 100, PARTS, ("tool_use", None)),
        ("length", None, 1, [TextPart("a")], ("max_tokens", None)),
        ("length", None, 1, PARTS, ("max_tokens", None)),
        ("length", None, 100, [TextPart("a")], ("model_context_window_exceeded", None)),
        ("stop", None, 100, [], ("end_turn", None)),
    ],
)
def test_reasons_of_the_end(
    finish_reason: str, stop: str | None, max_tokens: int, parts: list[Part], expected: tuple[str, str | None]
) -> None:
    deltas = deltas_of([parts], finish_reason, stop)
    whole = anthropic_whole(deltas, max_tokens=max_tokens)
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected
    assert anthropic_stream(deltas, max_tokens=max_tokens)[-2]["delta"] == {
        "stop_reason": expected[0],
        "stop_sequence": expected[1],
    }


def test_input_that_is_cut_off_keeps_what_is_complete() -> None:
    cut: list[Part] = [ToolCallPart(0, "c", "f", '{"a": [1, 2], "b": "x')]
    (block,) = anthropic_whole(deltas_of([cut], "length"))["content"]
    assert block["input"]["a"] == [1, 2]
    (block,) = anthropic_whole(deltas_of([[ToolCallPart(0, "c", "f", "no json")]], "stop"))["content"]
    assert block["input"] == {}


def test_ollamas_lines_hold_whole_calls_and_fold_to_the_whole_answer() -> None:
    calls = [
        {"id": "call_1", "function": {"index": 0, "name": "weather", "arguments": {"city": "Rome"}}},
        {"id": "call_2", "function": {"index": 1, "name": "time", "arguments": {}}},
    ]
    for cut in CUTS:
        deltas = deltas_of(cut(), "length")
        writer = OllamaWriter(JOB, "m:latest", chat_shape)
        content = b"".join(writer.write([delta]) for delta in deltas) + writer.end(result_of(deltas).usage)
        lines = [json.loads(line) for line in content.splitlines()]
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        messages = [line["message"] for line in lines]
        assert "".join(message["content"] for message in messages) == "Let me see.Done."
        assert "".join(message.get("thinking", "") for message in messages) == "I think"
        assert [call for message in messages for call in message.get("tool_calls", [])] == calls
        whole = json.loads(OllamaWriter(JOB, "m:latest", chat_shape).whole(result_of(deltas)))
        assert whole["message"] == {
            "role": "assistant",
            "content": "Let me see.Done.",
            "thinking": "I think",
            "tool_calls": calls,
        }
        for answer in (whole, lines[-1]):
            assert (answer["model"], answer["done_reason"]) == ("m:latest", "length")
            assert (answer["prompt_eval_count"], answer["eval_count"]) == (9, len(deltas))
    generated = json.loads(OllamaWriter(JOB, "m", generate_shape).whole(result_of(deltas_of([PARTS[:4]], "stop"))))
    assert (generated["response"], generated["thinking"]) == ("Let me see.", "I think")


@pytest.mark.parametrize("error", [NoWorkerError("gone"), InvalidRequestError("no")])
def test_streams_that_fail_end_with_an_error_of_their_shape(error: FastserveError) -> None:
    last = AnthropicWriter(MessagesJob(JOB, 5, shows_thinking=True)).error(error).decode()
    assert last.startswith("event: error\ndata: {")
    kind = "overloaded_error" if error.status == 503 else "invalid_request_error"
    assert json.loads(last.split("data: ")[1])["error"]["type"] == kind
    line = json.loads(OllamaWriter(JOB, "m", chat_shape).error(error))
    assert (line["error"], line["status"]) == (error.message, error.status)
