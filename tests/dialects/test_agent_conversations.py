"""Whole conversations in the shape of coding agents that speak Anthropic's API: each request has all turns so far."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastserve.text.tokenizer import Tokenizer
from tests.dialects.conftest import Serve, Served
from tests.responses.conftest import Talk
from tests.worker.conftest import MODEL

Fields = dict[str, Any]
HEADERS = {
    "x-api-key": "none",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "code-agent-2025-02-19,fine-grained-tool-streaming-2025-05-14",
}
MARK = {"type": "ephemeral"}
STRICT = {"additionalProperties": False, "$schema": "https://json-schema.org/draft/2020-12/schema"}
FILE = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"], **STRICT}
ODD_SCHEMAS: list[Fields] = [
    {},
    {"type": "object"},
    {"type": "object", "properties": {}, "required": []},
    {"properties": {"a": {}}},
    {"type": "object", "properties": {"a": True, "b": {"type": ["string", "null"], "default": None}}},
    {"type": "object", "properties": {"a": {"enum": ["x", 1, None, {"y": []}]}, "b": {"const": "é\u2028"}}},
    {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}}, "$defs": {"t": {}}},
    {
        "type": "object",
        "$defs": {"t": {"properties": {"next": {"$ref": "#/$defs/t"}}}},
        "allOf": [{"$ref": "#/$defs/t"}],
    },
    {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "number"}},
    {"type": "object", "patternProperties": {"^x-": {"format": "uri-reference"}}, "minProperties": 1},
    {"type": "object", "not": {"required": ["a"]}, "oneOf": [{"required": ["b"]}, {"required": ["c"]}]},
    {"type": "object", "properties": {"$dollar.dotted-name": {"type": "integer", "exclusiveMinimum": 0}}},
    {"type": "object", "properties": {"type": {"type": "string"}, "properties": {"type": "object"}}},
]


def tool(name: str, schema: Fields, **more: Any) -> Fields:
    return {"name": name, "description": f"{name}: a tool.", "input_schema": schema, **more}


TOOLS = [
    tool("Read", FILE),
    tool("Bash", {"type": "object", "properties": {"command": {"type": "string"}}}, eager_input_streaming=True),
    *(tool(f"mcp__{'server' * 15}__odd_{at}", schema) for at, schema in enumerate(ODD_SCHEMAS)),
    tool("n" * 128, FILE, type="custom", defer_loading=False, input_examples=[{"path": "a"}], cache_control=MARK),
]


def call_text(name: str, arguments: Fields) -> str:
    """A call in the demo model's form."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


class Agent:
    """Sends each turn as an agent does, and keeps the conversation."""

    def __init__(self, served: Served, talk: Talk) -> None:
        self.served = served
        self.talk = talk
        self.messages: list[Fields] = []

    def body(self) -> Fields:
        system = [
            {"type": "text", "text": "You write code."},
            {"type": "text", "text": "Be brief.", "cache_control": MARK},
        ]
        return {"model": MODEL, "system": system, "messages": self.messages, "tools": TOOLS}

    def asking(self, **more: Any) -> Fields:
        metadata = {"user_id": "user_1_session_2"}
        return {**self.body(), "max_tokens": 32000, "temperature": 1, "metadata": metadata, "stream": True, **more}

    async def turn(self, answer: str, *blocks: Fields) -> Fields:
        """Send a turn of the user; returns the message that the stream makes, which becomes the next turn."""
        self.talk.text = answer
        self.messages.append({"role": "user", "content": list(blocks)})
        code, counted = await self.served.post("/v1/messages/count_tokens?beta=true", self.body(), **HEADERS)
        assert code == 200, counted
        async with self.served.http.post(
            self.served.url + "/v1/messages?beta=true", json=self.asking(), headers=HEADERS
        ) as response:
            content = await response.text()
        assert response.status == 200, content
        message = folded(content)
        usage = message["usage"]
        assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
        self.messages.append({"role": "assistant", "content": message["content"]})
        return message

    async def leave(self, answer: str, *blocks: Fields) -> str:
        """Send a turn of the user, and leave in the middle of the answer; returns the text until then."""
        self.talk.slowly(answer, 0.02)
        self.messages.append({"role": "user", "content": list(blocks)})
        text = ""
        async with self.served.http.post(
            self.served.url + "/v1/messages?beta=true", json=self.asking(), headers=HEADERS
        ) as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    delta = json.loads(line[6:]).get("delta", {})
                    text += delta.get("text", delta.get("partial_json", ""))
                if len(text) > 10:
                    break
            response.close()
        await self.served.worker.idle()
        self.talk.slowly("", 0.0)
        return text


def folded(content: str) -> Fields:
    """The message of a stream's events, each of which must come in its place."""
    message: Fields = {}
    blocks: list[Fields] = []
    pieces: list[str] = []
    is_open = False
    for event in content.strip().split("\n\n"):
        if event.startswith(":"):
            continue
        first, second = event.split("\n")
        data = json.loads(second.removeprefix("data: "))
        assert first == f"event: {data['type']}"
        match data["type"]:
            case "message_start":
                assert not message
                message = data["message"]
            case "content_block_start":
                assert not is_open
                assert data["index"] == len(blocks)
                blocks.append(data["content_block"])
                pieces, is_open = [], True
            case "content_block_delta":
                assert (is_open, data["index"]) == (True, len(blocks) - 1)
                pieces.append(data["delta"].get("text", data["delta"].get("partial_json")))
            case "content_block_stop":
                is_open = False
                if blocks[-1]["type"] == "tool_use":
                    blocks[-1]["input"] = json.loads("".join(pieces) or "{}")
                else:
                    blocks[-1]["text"] = "".join(pieces)
            case "message_delta":
                message |= data["delta"]
                message["usage"] = message["usage"] | data["usage"]
            case kind:
                assert kind == "message_stop"
    assert content.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')
    return message | {"content": blocks}


def text(value: str, **more: Any) -> Fields:
    return {"type": "text", "text": value, **more}


def result(call: Fields, content: Any, **more: Any) -> Fields:
    return {"type": "tool_result", "tool_use_id": call["id"], "content": content, **more}


@pytest.fixture
async def agent(serve: Serve, tokenizer: Tokenizer) -> AsyncIterator[Agent]:
    talk = Talk(tokenizer)
    async with serve(talk, prepare=lambda fake: setattr(talk, "engine", fake), max_model_len=8192) as served:
        yield Agent(served, talk)


async def test_parallel_calls_are_answered_over_several_turns(agent: Agent) -> None:
    calls = [("Read", {"path": "a.py"}), ("Bash", {"command": 'echo "x" | wc\n'}), ("n" * 128, {"path": "é"})]
    first = await agent.turn(
        "I look.\n" + "\n".join(call_text(*call) for call in calls), text("Fix it.", cache_control=MARK)
    )
    said, *used = first["content"]
    assert said == text("I look.")
    assert [(block["name"], block["input"]) for block in used] == calls
    assert len({block["id"] for block in used}) == 3
    assert first["stop_reason"] == "tool_use"
    read, bash, other = used
    second = await agent.turn(
        call_text("Read", {"path": "b.py"}),
        result(bash, [text("1 1 2"), text("(done)")], cache_control=MARK),
        result(other, "", is_error=False),
        result(read, "No such file.", is_error=True),
        text("<reminder>The list of tasks is empty.</reminder>"),
    )
    prompt = agent.talk.prompts[-1]
    assert [block["type"] for block in second["content"]] == ["tool_use"]
    assert prompt.index("1 1 2") < prompt.index("Error:") < prompt.index("<reminder>")
    third = await agent.turn("All is well.", result(second["content"][0], [text("pass")]))
    assert (third["content"], third["stop_reason"]) == ([text("All is well.")], "end_turn")
    agent.talk.text = "All is well."
    agent.messages.append({"role": "user", "content": "Thanks."})
    code, whole = await agent.served.post("/v1/messages?beta=true", agent.asking(stream=False), **HEADERS)
    assert (code, whole["content"]) == (200, [text("All is well.")])


async def test_a_conversation_goes_on_after_answers_that_were_left(agent: Agent) -> None:
    said = await agent.leave("One two three four five. " * 30, text("Tell me."))
    agent.messages.append({"role": "assistant", "content": [text(said)]})
    answer = await agent.turn(
        call_text("Bash", {"command": "ls"}), text("[Request interrupted by user]"), text("List the files.")
    )
    await agent.leave(
        call_text("Read", {"path": "a very long path " * 30}), result(answer["content"][0], "a.py"), text("Read it.")
    )
    # The call that broke off is left out, and the turn of the user is sent again.
    agent.messages.pop()
    last = await agent.turn(
        "Fine.", result(answer["content"][0], "a.py"), text("[Request interrupted by user for tool use]")
    )
    assert last["content"] == [text("Fine.")]
    assert said in agent.talk.prompts[-1]


async def test_an_image_is_refused_by_its_place_and_its_text_is_answered(agent: Agent) -> None:
    first = await agent.turn(call_text("Read", {"path": "a.png"}), text("Look."))
    (call,) = first["content"]
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    agent.messages.append({"role": "user", "content": [result(call, [text("a.png"), image])]})
    for path, body in (("/v1/messages", agent.asking()), ("/v1/messages/count_tokens", agent.body())):
        code, refused = await agent.served.post(f"{path}?beta=true", body, **HEADERS)
        assert (code, refused["error"]["type"]) == (400, "invalid_request_error")
        assert refused["error"]["param"] == "messages.2.content.0.content.1"
    agent.messages.pop()
    last = await agent.turn("I cannot see it.", result(call, [text("[an image]")]))
    assert last["stop_reason"] == "end_turn"


USE = {"type": "tool_use", "id": "t1", "name": "Read", "input": {"path": "a"}}
ASK = {"role": "user", "content": "hi"}
DONE = {"type": "tool_result", "tool_use_id": "t1", "content": "x"}


WRONG: list[tuple[Fields, str]] = [
    ({"messages": [ASK, {"role": "assistant", "content": [text("a"), USE]}]}, "messages.1.content.1"),
    (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": [USE | {"id": "t0"}, USE]},
                {"role": "user", "content": [text("b"), DONE]},
            ]
        },
        "messages.1.content.0",
    ),
    (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": [USE]},
                {"role": "user", "content": [DONE, text("b"), DONE]},
            ]
        },
        "messages.2.content.2.tool_use_id",
    ),
    ({"tools": [tool("ok", {}), tool("not a name", {})]}, "tools.1.name"),
    ({"tools": [tool("ok", {}), tool("list", {"type": "array"})]}, "tools.1.input_schema"),
    ({"tools": [tool("ok", {}), tool("ok", {})]}, "tools.1"),
    (
        {"tools": [tool("ok", {}), tool("no", {"properties": {"a": {"not": {}}}})], "tool_choice": {"type": "any"}},
        "tools.1.input_schema.properties.a",
    ),
]
"""Changes of a request, and the place that is wrong then."""


async def test_errors_about_a_conversation_name_what_the_agent_sent(agent: Agent) -> None:
    agent.messages.append(ASK)
    for change, param in WRONG:
        code, answer = await agent.served.post("/v1/messages?beta=true", agent.asking(**change), **HEADERS)
        error = answer["error"]
        assert (code, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert f"'{param}'" in error["message"]
