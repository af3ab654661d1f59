"""/v1/responses through the API server with OpenAI's client: whole, streamed, parsed; each part becomes an item."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pydantic
import pytest

from fastserve.openai.answers import Usage
from fastserve.text.parts import ParserFactory, Part, ReasoningPart, TextPart, ToolCallPart
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.writers.responses import ResponsesWriter
from tests.responses.conftest import MODEL, Fleet, Item

in_module_loop = pytest.mark.asyncio(loop_scope="module")


class Marked:
    """Parses `<kind>text` pieces: think, text, call. Text goes out letter by letter, as a stream would."""

    is_reasoning = False
    has_calls = False
    is_complete = False

    def __init__(self, choice: int = 0) -> None:
        self._text = ""

    def push(self, text: str) -> list[Part]:
        self._text += text
        return []

    def finish(self, *, cut_off: bool = False) -> list[Part]:
        parts: list[Part] = []
        calls = -1
        for piece in self._text.split("<")[1:]:
            kind, _, text = piece.partition(">")
            if kind == "think":
                parts += map(ReasoningPart, text)
            elif kind == "text":
                parts += map(TextPart, text)
            else:
                calls += 1
                parts.append(ToolCallPart(calls, f"call_{calls}", kind))
                parts += [ToolCallPart(calls, arguments=letter) for letter in text]
        return parts


def without_ids(items: list[Item]) -> list[Item]:
    return [{key: value for key, value in item.items() if key != "id"} for item in items]


def check_stream(events: list[Item]) -> Item:
    """What holds for every stream; returns the final response."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    final: Item = events[-1]["response"]
    assert events[-1]["type"] == f"response.{final['status']}"
    assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}
    done = [event for event in events if event["type"] == "response.output_item.done"]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["item"] for event in done] == final["output"]
    assert [event["output_index"] for event in added] == list(range(len(final["output"])))
    open_item = None
    for event in events:
        if event["type"] == "response.output_item.added":
            assert open_item is None
            open_item = event["item"]["id"]
        elif event["type"] == "response.output_item.done":
            assert event["item"]["id"] == open_item
            open_item = None
        elif "item_id" in event:
            assert event["item_id"] == open_item
    for item in final["output"]:
        deltas = "".join(
            event["delta"]
            for event in events
            if event["type"].endswith(".delta") and event.get("item_id") == item["id"]
        )
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    return final


@in_module_loop
async def test_whole_and_streamed_answers_with_the_client(fleet: Fleet) -> None:
    client = fleet.client()
    whole = await client.responses.create(model=MODEL, input="hi", instructions="Be brief.", metadata={"a": "b"})
    assert (whole.output_text, whole.status, whole.metadata) == ("Hello there.", "completed", {"a": "b"})
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert "Be brief." in fleet.talk.prompts[-1]
    async with client.responses.stream(model=MODEL, input="hi", instructions="Be brief.") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage
    assert fleet.talk.prompts[-1] == fleet.talk.prompts[-2]


@in_module_loop
async def test_parse_reads_the_text_as_the_clients_model(fleet: Fleet) -> None:
    class City(pydantic.BaseModel):
        name: str

    fleet.talk.text = '{"name": "Oslo"}'
    form = {"type": "json_object"}
    status, answer = await fleet.create(text={"format": form})
    if status == 400:
        assert answer["error"]["param"] == "text.format"
        pytest.skip("response formats are not supported")
    parsed = await fleet.client().responses.parse(model=MODEL, input="a city", text_format=City)
    assert parsed.output_parsed == City(name="Oslo")


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<text>Hi.", ["message"]),
        ("", ["message"]),
        ("<think>Hm.<text>Hi.", ["reasoning", "message"]),
        ('<think>a<look>{"x":1}<look>{}', ["reasoning", "function_call", "function_call"]),
        ('<text>a<look>{"x":1}<text>b', ["message", "function_call", "message"]),
        ("<think>a", ["reasoning"]),
    ],
)
@in_module_loop
async def test_parts_become_the_same_items_streamed_and_whole(
    fleet: Fleet, parse_with: Callable[[ParserFactory], None], text: str, kinds: list[str]
) -> None:
    parse_with(Marked)
    fleet.talk.text = text
    status, whole = await fleet.create()
    assert status == 200
    assert [item["type"] for item in whole["output"]] == kinds
    events = await fleet.events(body={"model": MODEL, "input": "hi", "stream": True})
    final = check_stream(events)
    assert [item["id"][:3] for item in final["output"]] == [item["id"][:3] for item in whole["output"]]
    calls = [item.pop("call_id") for item in (*final["output"], *whole["output"]) if "call_id" in item]
    assert calls == [f"call_{number}" for number in range(len(calls) // 2)] * 2
    assert without_ids(final["output"]) == without_ids(whole["output"])
    async with fleet.client().responses.stream(model=MODEL, input="hi") as stream:
        response = await stream.get_final_response()
    assert [item.type for item in response.output] == kinds


def test_calls_of_custom_tools_have_a_text_as_input() -> None:
    response = {"id": "resp_1", "status": "in_progress", "background": False, "output": []}
    writer = ResponsesWriter(response, frozenset({"patch"}))
    pieces = [
        ToolCallPart(0, "call_1", "patch"),
        *(ToolCallPart(0, arguments=letter) for letter in '{"input":"*** x"}'),
    ]
    calls = [ToolCallPart(1, "call_2", "look", "{}"), ToolCallPart(2, "call_3", "patch", "broken")]
    written = writer.write([ChoiceDelta(0, [*pieces, *calls], None, "stop", 5, 0)]) + writer.end(Usage(1, 5))
    events = [json.loads(block.split("data: ")[1]) for block in written.decode().split("\n\n")[:-1]]
    items = events[-1]["response"]["output"]
    assert [(item["type"], item.get("input")) for item in items] == [
        ("custom_tool_call", "*** x"),
        ("function_call", None),
        ("custom_tool_call", "broken"),
    ]
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == items
    inputs = [event["input"] for event in events if event["type"] == "response.custom_tool_call_input.done"]
    assert inputs == ["*** x", "broken"]


@in_module_loop
async def test_an_answer_that_is_cut_off_is_incomplete(fleet: Fleet) -> None:
    fleet.talk.text = "word " * 100
    body = {"model": MODEL, "input": "hi", "max_output_tokens": 16}
    for answer in (
        (await fleet.create(max_output_tokens=16))[1],
        check_stream(await fleet.events(body=body | {"stream": True})),
    ):
        assert answer["status"] == "incomplete"
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
        assert answer["output"][-1]["status"] == "incomplete"
        assert answer["usage"]["output_tokens"] == 16


@in_module_loop
async def test_logprobs_belong_to_the_text(fleet: Fleet) -> None:
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    _, whole = await fleet.create(**fields)
    (part,) = whole["output"][0]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    events = await fleet.events(body={"model": MODEL, "input": "hi", "stream": True, **fields})
    streamed = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert streamed == part["logprobs"] == check_stream(events)["output"][0]["content"][0]["logprobs"]


@in_module_loop
async def test_obfuscation_evens_out_the_length_of_deltas(fleet: Fleet) -> None:
    body = {"model": MODEL, "input": "hi", "stream": True, "stream_options": {"include_obfuscation": True}}
    deltas = [event for event in await fleet.events(body=body) if event["type"].endswith(".delta")]
    assert {len(event["delta"] + event["obfuscation"]) % 32 for event in deltas} == {0}


@in_module_loop
async def test_input_tokens_are_those_of_the_answer(fleet: Fleet) -> None:
    _, answer = await fleet.create()
    counted = await fleet.client().responses.input_tokens.count(model=MODEL, input="hi")
    assert counted.input_tokens == answer["usage"]["input_tokens"]
    assert counted.object == "response.input_tokens"


@in_module_loop
async def test_errors_before_and_in_a_stream(fleet: Fleet) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await fleet.client().responses.create(model=MODEL, input="word " * 5000, stream=True)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    fleet.talk.slowly("word " * 100, token_s=0.05)
    stream = await fleet.client().responses.create(model=MODEL, input="hi", stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            fleet.worker.engine.die()
            break
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.code == "server_error"
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
