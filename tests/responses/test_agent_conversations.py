"""Whole conversations in the shape of coding agents that speak the Responses API without its store: each request has
all items so far, and answers are read from the stream's items as they are done."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.responses.conftest import MODEL, Fleet, Item
from tests.responses.test_create import check_stream

in_module_loop = pytest.mark.asyncio(loop_scope="module")

INSTRUCTIONS = "You are a coding agent."
COMMAND = {"type": "array", "items": {"type": "string"}, "description": "The command."}
SHELL = {
    "type": "object",
    "properties": {"command": COMMAND, "timeout_ms": {"type": "number"}, "with_rights": {"type": ["boolean", "null"]}},
    "required": ["command"],
    "additionalProperties": False,
}
STEPS = {"type": "array", "items": {"type": "object", "properties": {"status": {"enum": ["done", "open"]}}}}


def function(name: str, schema: Any, **more: Any) -> Item:
    return {"type": "function", "name": name, "description": f"{name}.", "strict": False, "parameters": schema, **more}


PATCH_GRAMMAR = 'start: "*** Begin" line+ "*** End"\nline: /[^\\n]*\\n/'
TOOLS: list[Item] = [
    function("shell", SHELL),
    function("update_plan", {"type": "object", "properties": {"plan": STEPS}, "required": ["plan"]}),
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Changes files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": PATCH_GRAMMAR},
    },
    {"type": "web_search", "external_web_access": False},
    {"type": "image_generation"},
    {"type": "local_shell"},
    function("view_image", {"type": "object", "properties": {}}, output_schema={"type": "object"}),
    function(f"mcp__{'server' * 18}__odd", {"type": "object", "propertyNames": {"minLength": 1}, "not": {}}),
    function("no_fields", {"properties": {}}, defer_loading=True),
]


def user(text: str) -> Item:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def developer(text: str) -> Item:
    return user(text) | {"role": "developer"}


def output(call: Item, value: Any) -> Item:
    return {"type": f"{call['type']}_output", "call_id": call["call_id"], "output": value}


def call_text(name: str, arguments: Any) -> str:
    """A call in the demo model's form."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


class Agent:
    """Sends each turn as an agent does, and keeps the items."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.items = [developer("<permissions>"), user("<environment>")]

    def body(self, **more: Any) -> Item:
        body = {
            "model": MODEL,
            "instructions": INSTRUCTIONS,
            "input": self.items,
            "tools": TOOLS,
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "0199-4f",
            "text": {"verbosity": "low"},
            "client_metadata": {"installation": "x"},
        }
        return body | more

    async def turn(self, answer: str, *items: Item) -> list[Item]:
        """Send items; returns those of the answer, which become part of the conversation without their ids."""
        self.fleet.talk.text = answer
        self.items += items
        counting = {name: self.body()[name] for name in ("model", "instructions", "input", "tools", "reasoning")}
        code, counted = await self.fleet.call("POST", "/v1/responses/input_tokens", counting)
        assert code == 200, counted
        events = await self.fleet.events(body=self.body())
        final = events[-1]["response"]
        assert (events[-1]["type"], final["store"]) == ("response.completed", False)
        assert final["usage"]["input_tokens"] == counted["input_tokens"]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == final["output"]
        self.items += [{name: item[name] for name in item if name not in ("id", "status")} for item in done]
        return done

    async def leave(self, answer: str, *items: Item) -> None:
        """Send items, and leave in the middle of the answer."""
        self.items += items
        self.fleet.talk.slowly(answer, 0.02)
        async with self.fleet.http.post(f"{self.fleet.url}/v1/responses", json=self.body()) as response:
            async for line in response.content:
                if line.startswith(b"data: ") and json.loads(line[6:])["type"] == "response.output_item.added":
                    break
            response.close()
        await self.fleet.worker.idle()
        self.fleet.talk.slowly("", 0.0)


@in_module_loop
async def test_parallel_calls_and_patches_are_answered_over_several_turns(fleet: Fleet) -> None:
    agent = Agent(fleet)
    patch = '*** Begin\n+ "é" \\ x\n*** End'
    calls = [("shell", {"command": ["ls", "-l"]}), ("update_plan", {"plan": [{"status": "open"}]})]
    answer = "I look.\n" + "\n".join(call_text(*call) for call in calls)
    said, shell, plan = await agent.turn(answer, user("Fix it."))
    assert said["content"][0]["text"] == "I look."
    assert [(call["name"], json.loads(call["arguments"])) for call in (shell, plan)] == calls
    assert shell["call_id"] != plan["call_id"]
    listed = json.dumps({"output": "a.py\n", "metadata": {"exit_code": 0}})
    (patching,) = await agent.turn(
        call_text("apply_patch", {"input": patch}),
        output(plan, [{"type": "input_text", "text": "Plan updated"}]),
        output(shell, listed),
    )
    assert (patching["type"], patching["input"]) == ("custom_tool_call", patch)
    prompt = fleet.talk.prompts[-1]
    assert prompt.index("<permissions>") < prompt.index("<environment>") < prompt.index("Plan updated")
    (last,) = await agent.turn("All is well.", output(patching, "Done."))
    assert last["content"][0]["text"] == "All is well."
    assert "view_image" in fleet.talk.prompts[-1]
    assert "image_generation" not in fleet.talk.prompts[-1]
    code, whole = await fleet.call(
        "POST", "/v1/responses", agent.body(stream=False, input=[*agent.items, user("Thanks.")])
    )
    assert (code, whole["output"][0]["content"][0]["text"]) == (200, "All is well.")
    check_stream(await fleet.events(body=agent.body(input=[*agent.items, user("Thanks.")])))


@in_module_loop
async def test_a_conversation_goes_on_after_answers_that_were_left(fleet: Fleet) -> None:
    agent = Agent(fleet)
    await agent.leave("One two three four five. " * 30, user("Tell me."))
    (call,) = await agent.turn(call_text("shell", {"command": ["ls"]}), user("<turn_aborted>"), user("List the files."))
    await agent.leave(
        call_text("apply_patch", {"input": "a long patch " * 40}), output(call, "aborted by user after 0.1s")
    )
    (last,) = await agent.turn("Fine.", user("<turn_aborted>"), developer("<permissions> have changed"), user("Go on."))
    assert last["content"][0]["text"] == "Fine."
    assert "aborted by user" in fleet.talk.prompts[-1]


@in_module_loop
async def test_images_are_refused_by_their_place_and_the_rest_is_answered(fleet: Fleet) -> None:
    agent = Agent(fleet)
    (call,) = await agent.turn(call_text("view_image", {}), user("Look."))
    image = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
    for item, param in (
        (output(call, [image]), "input.4.output"),
        (user("x") | {"content": [{"type": "input_text", "text": "x"}, image]}, "input.4.content"),
        ({"type": "image_generation_call", "id": "ig_1", "result": "aGk="}, "input.4.type"),
    ):
        code, refused = await fleet.call("POST", "/v1/responses", agent.body(input=[*agent.items, item]))
        assert (code, refused["error"]["param"]) == (400, param)
    (last,) = await agent.turn("I cannot see it.", output(call, "an image"))
    assert last["type"] == "message"


CALL = {"type": "function_call", "call_id": "c1", "name": "shell", "arguments": "{}"}
DONE = {"type": "function_call_output", "call_id": "c1", "output": "x"}
WRONG: list[tuple[Item, str]] = [
    ({"input": [user("hi"), CALL, user("go on")]}, "input.1"),
    ({"input": [user("hi"), CALL, CALL | {"call_id": "c2"}, DONE]}, "input.2"),
    ({"input": [user("hi"), CALL, DONE, DONE]}, "input.3.call_id"),
    ({"input": [user("hi"), DONE]}, "input.1.call_id"),
    ({"tools": [{"type": "web_search"}, function("not a name", {})]}, "tools.1.name"),
    ({"tools": [{"type": "web_search"}, function("shell", {"type": "array"})]}, "tools.1.parameters"),
    (
        {"tools": [{"type": "web_search"}, function("shell", {"properties": {"a": {"not": {}}}}, strict=True)]},
        "tools.1.parameters.properties.a",
    ),
]
"""Changes of a request, and the place that is wrong then."""


@in_module_loop
async def test_errors_about_a_conversation_name_what_the_agent_sent(fleet: Fleet) -> None:
    agent = Agent(fleet)
    for change, param in WRONG:
        code, answer = await fleet.call("POST", "/v1/responses", agent.body(**change))
        assert (code, answer["error"]["param"]) == (400, param), answer
        assert f"'{param}'" in answer["error"]["message"]
