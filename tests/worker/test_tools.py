"""Tools and reasoning of chats, through the worker with a scripted engine and OpenAI's client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import MODEL, Running, RunWorker

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALL_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
HELLO = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": [WEATHER, NOW]}


@pytest.fixture(scope="module")
def answer() -> dict[str, str]:
    """The text that the engine generates next."""
    return {"text": ""}


@pytest.fixture
async def running(run_worker: RunWorker, tokenizer: Tokenizer, answer: dict[str, str]) -> AsyncIterator[Running]:
    def script(request: EngineRequest, info: EngineInfo) -> list[int]:
        return tokenizer.encode(answer["text"], add_special_tokens=False)

    async with run_worker(script) as running:
        yield running


async def ask(running: Running, **fields: Any) -> dict[str, Any]:
    status, body = await running.post("/v1/chat/completions", BODY | fields)
    assert status == 200, body
    return body


async def refused(running: Running, **fields: Any) -> dict[str, Any]:
    status, body = await running.post("/v1/chat/completions", BODY | fields)
    assert status == 400, body
    error: dict[str, Any] = body["error"]
    return error


async def test_calls_streamed_and_whole(running: Running, answer: dict[str, str]) -> None:
    answer["text"] = f"Let me look.\n{CALL}\n{CALL_NOW}"
    whole = (await ask(running))["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Let me look."
    calls = whole["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"name": "now", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    async with running.openai.chat.completions.stream(**BODY) as stream:
        async for _ in stream:
            pass
        final = (await stream.get_final_completion()).choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Let me look."
    assert [call.function.arguments for call in final.message.tool_calls or ()] == ['{"city": "Oslo"}', "{}"]
    prompt = running.runtime.jobs.tokenizer.decode(running.engine.requests[0].prompt_ids)
    assert '"get_weather"' in prompt, "tools are shown to the model"


async def test_ids_are_the_same_for_the_same_request(running: Running, answer: dict[str, str]) -> None:
    answer["text"] = CALL
    found = set()
    for request_id in ("a", "a", "b"):
        _, body = await running.post("/v1/chat/completions", BODY | {"n": 2}, **{"x-request-id": request_id})
        found |= {choice["message"]["tool_calls"][0]["id"] for choice in body["choices"]}
    assert len(found) == 4, "two choices of two requests"


async def test_choices_of_tools(running: Running, answer: dict[str, str]) -> None:
    answer["text"] = f"{CALL}\n{CALL_NOW}"
    only = {"type": "function", "function": {"name": "now"}}
    none = (await ask(running, tool_choice="none"))["choices"][0]
    assert none["message"]["content"] == answer["text"], "no calls are looked for"
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [only]}}
    choice = (await ask(running, tool_choice=allowed))["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]
    assert choice["message"]["content"] == CALL, "a tool that is not allowed is text"
    one = (await ask(running, parallel_tool_calls=False))["choices"][0]
    assert [call["function"]["name"] for call in one["message"]["tool_calls"]] == ["get_weather"]
    assert (one["finish_reason"], one["message"]["content"]) == ("tool_calls", None)


async def test_required_and_named_calls_are_enforced_by_a_grammar(running: Running, answer: dict[str, str]) -> None:
    answer["text"] = CALL
    named = {"type": "function", "function": {"name": "get_weather"}}
    for tool_choice, reason in (("required", "tool_calls"), (named, "stop")):
        fields = {"tool_choice": tool_choice}
        job = running.runtime.jobs.chat_from_fields(BODY | fields, running_caller())
        grammar = job.prompts[0].params.grammar
        assert '"city"' in grammar
        assert ("now" in grammar) == (tool_choice == "required")
        assert job.output.calls_finish_reason == reason


BAD = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string", "pattern": "(?=x)"}}}}
REMOTE = {"type": "object", "properties": {"a": {"$ref": "https://example.com/schema"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tools.1.function.parameters.properties.a.items"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tools.1.function.parameters.properties.a.items",
        ),
        ({"strict": True}, "tools.1.function.parameters.properties.a.items"),
        ({"parameters": REMOTE, "tool_choice": "required"}, "tools.1.function.parameters.properties.a.$ref"),
        ({"old": True, "function_call": {"name": "x"}}, "functions.1.parameters.properties.a.items"),
        ({"parameters": {}, "tool_choice": "required", "min_tokens": 3}, "min_tokens"),
        ({"parameters": {}, "strict": True, "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_a_schema_of_arguments_that_cannot_be_enforced_is_refused_with_its_place(
    running: Running, fields: dict[str, Any], param: str
) -> None:
    function = {"name": "x", "parameters": fields.pop("parameters", BAD), "strict": fields.pop("strict", False)}
    if fields.pop("old", False):
        fields |= {"tools": None, "functions": [WEATHER["function"], function]}
    else:
        fields["tools"] = [WEATHER, {"type": "function", "function": function}]
    error = await refused(running, **fields)
    assert error["param"] == param
    assert f"'{param}'" in error["message"]


async def test_a_schema_that_is_only_shown_is_not_compiled(running: Running, answer: dict[str, str]) -> None:
    answer["text"] = "ok"
    await ask(running, tools=[{"type": "function", "function": {"name": "x", "parameters": BAD}}])


async def test_forced_calls_have_no_arguments_that_the_schema_does_not_name(running: Running) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    for schema, is_closed in (
        (city, True),
        ({"type": "object", "properties": {}}, True),
        ({**city, "required": ["land"]}, False),
        ({**city, "additionalProperties": {"type": "integer"}}, False),
        ({**city, "minProperties": 2}, False),
        ({"type": "object"}, False),
    ):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        fields = {"tools": [tool], "tool_choice": "required"}
        job = running.runtime.jobs.chat_from_fields(BODY | fields, running_caller())
        assert ('"additionalProperties": false' in job.prompts[0].params.grammar) == is_closed, schema


def running_caller() -> Any:
    from fastserve.worker.caller import Caller

    return Caller("r", None, 0.0, may_prioritise=False)


async def test_functions_of_old_clients(running: Running, answer: dict[str, str]) -> None:
    answer["text"] = f"{CALL}\n{CALL_NOW}"
    fields = {"tools": None, "functions": [WEATHER["function"], NOW["function"]]}
    choice = (await ask(running, **fields))["choices"][0]
    call = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert (choice["finish_reason"], choice["message"]["function_call"]) == ("function_call", call)
    history = [
        *HELLO,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "get_weather", "content": "rain"},
    ]
    answer["text"] = "It rains."
    choice = (await ask(running, messages=history, **fields))["choices"][0]
    assert choice["message"]["content"] == "It rains."


async def test_a_call_that_the_limit_cuts_off(running: Running, answer: dict[str, str], tokenizer: Tokenizer) -> None:
    answer["text"] = CALL
    num_tokens = len(tokenizer.encode(CALL[: CALL.index("Oslo")], add_special_tokens=False))
    choice = (await ask(running, max_tokens=num_tokens))["choices"][0]
    assert choice["finish_reason"] == "length"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert '{"city": "Oslo"}'.startswith(arguments)
    assert arguments.startswith("{")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("Oslo", CALL, "stop"),
        ("city", CALL, "stop"),
        ("Oslo", CALL.replace("Oslo", "Rome") + "\n" + CALL, "stop"),
        ("</tool_call>", CALL, "tool_calls"),
        ("behind", CALL + " behind", "tool_calls"),
    ],
)
async def test_a_call_that_a_stop_string_cuts_off_is_not_said_to_be_whole(
    running: Running, answer: dict[str, str], stop: str, text: str, reason: str
) -> None:
    answer["text"] = text
    choice = (await ask(running, stop=[stop]))["choices"][0]
    assert choice["message"]["tool_calls"]
    assert choice["finish_reason"] == reason


async def test_logprobs_of_calls_arrive_once(running: Running, answer: dict[str, str], tokenizer: Tokenizer) -> None:
    answer["text"] = f"So: {CALL}"
    num_tokens = len(tokenizer.encode(answer["text"], add_special_tokens=False))
    whole = (await ask(running, logprobs=True))["choices"][0]
    assert len(whole["logprobs"]["content"]) == num_tokens
    tokens: list[Any] = []
    async for chunk in await running.openai.chat.completions.create(**BODY, stream=True, logprobs=True):
        for choice in chunk.choices:
            tokens += [] if choice.logprobs is None else choice.logprobs.content or []
    assert [token.token for token in tokens] == [token["token"] for token in whole["logprobs"]["content"]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 129}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]}, "tools.0.function.parameters"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "string"}}}]},
            "tools.0.function.parameters",
        ),
        ({"tools": [{"type": "function", "function": {"name": "x", "strict": 1}}]}, "tools.0.function.strict"),
        ({"tools": "x"}, "tools"),
        ({"tools": [1]}, "tools.0"),
        ({"tools": [NOW] * 1025}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice.allowed_tools.tools",
        ),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"tools": None, "functions": [{}]}, "functions.0.name"),
        ({"tools": None, "functions": [{"name": "x"}], "function_call": {"name": "y"}}, "function_call.name"),
        ({"function_call": "auto"}, "function_call"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"include_reasoning": "no"}, "include_reasoning"),
    ],
)
async def test_malformed_fields_are_refused_by_name(running: Running, fields: dict[str, Any], param: str) -> None:
    error = await refused(running, **fields)
    assert error["param"] == param
    assert f"'{param}'" in error["message"]


async def test_a_schema_that_calls_must_obey_is_refused_by_its_place(running: Running, answer: dict[str, str]) -> None:
    answer["text"] = "Fine."
    wrong = {"type": "object", "properties": {"a": {}, "b": {"items": {"not": {}}}}}
    function = {"name": "x", "parameters": wrong}
    tools = [NOW, {"type": "function", "function": function}]
    strict = [NOW, {"type": "function", "function": {**function, "strict": True}}]
    place = "parameters.properties.b.items"
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"tools": strict}, "tools.1.function"),
        ({"tools": tools, "tool_choice": "required"}, "tools.1.function"),
        ({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tools.1.function"),
        ({"tools": None, "functions": [function], "function_call": {"name": "x"}}, "functions.0"),
    ]
    for fields, where in refusals:
        error = await refused(running, **fields)
        assert error["param"] == f"{where}.{place}"
        assert f"'{where}.{place}'" in error["message"]
    named = {"type": "function", "function": {"name": "now"}}
    for choice in ({"tools": tools}, {"tools": tools, "tool_choice": named}, {"tools": strict, "tool_choice": "none"}):
        await ask(running, **choice)


async def test_each_answer_of_a_tool_belongs_to_a_call(running: Running, answer: dict[str, str]) -> None:
    answer["text"] = "Rain."

    def turn(*ids: str) -> dict[str, Any]:
        calls = [{"id": i, "type": "function", "function": {"name": "now", "arguments": "{}"}} for i in ids]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    def result(call_id: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": call_id, "content": "x"}

    await ask(running, messages=[*HELLO, turn("a", "b"), result("b"), result("a"), *HELLO])
    for messages, param in (
        ([*HELLO, result("a")], "messages.1.tool_call_id"),
        ([*HELLO, turn("a"), result("b")], "messages.2.tool_call_id"),
        ([*HELLO, turn("a"), result("a"), result("a")], "messages.3.tool_call_id"),
        ([*HELLO, turn("a", "b"), result("a"), *HELLO], "messages.1.tool_calls.1"),
        ([*HELLO, turn("a")], "messages.1.tool_calls.0"),
    ):
        assert (await refused(running, messages=messages))["param"] == param


# ---- reasoning --------------------------------------------------------------------------------------------------


@pytest.fixture
async def thinking(run_worker: RunWorker, tokenizer: Tokenizer, answer: dict[str, str]) -> AsyncIterator[Running]:
    def script(request: EngineRequest, info: EngineInfo) -> list[int]:
        return tokenizer.encode(answer["text"], add_special_tokens=False)

    async with run_worker(script, reasoning_parser="qwen3") as running:
        yield running


async def test_reasoning_is_told_apart(thinking: Running, answer: dict[str, str], tokenizer: Tokenizer) -> None:
    answer["text"] = f"<think>\nI know.\n</think>\n\nSo be it. {CALL}"
    body = await ask(thinking)
    message = body["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "I know."
    assert (message["content"], len(message["tool_calls"])) == ("So be it.", 1)
    num_tokens = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 1 < num_tokens <= len(tokenizer.encode("<think>\nI know.\n</think>", add_special_tokens=False))
    hidden = (await ask(thinking, include_reasoning=False))["choices"][0]["message"]
    assert "reasoning" not in hidden
    assert hidden["content"] == "So be it."
    raw = (await ask(thinking, separate_reasoning=False))["choices"][0]["message"]
    assert raw["content"].startswith("<think>\nI know.\n</think>")
    cut = (await ask(thinking, max_tokens=8, tools=None))["choices"][0]
    assert cut["finish_reason"] == "length"
    assert cut["message"]["content"] is None
    assert cut["message"]["reasoning"]


async def test_reasoning_of_the_history_reaches_the_template(thinking: Running, answer: dict[str, str]) -> None:
    answer["text"] = "ok"
    for name in ("reasoning", "reasoning_content"):
        history = [*HELLO, {"role": "assistant", "content": "a", name: "because"}, *HELLO]
        await ask(thinking, messages=history, reasoning_effort="low")


ONE_FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}}


async def test_a_format_begins_after_the_reasoning(thinking: Running, answer: dict[str, str]) -> None:
    answer["text"] = "<think>\nhm\n</think>\n\n7"
    message = (await ask(thinking, tools=None, **ONE_FORMAT))["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", "7")
    grammar = thinking.engine.requests[-1].params.grammar
    assert grammar.startswith("start: ("), "it may think"
    assert "thought" in grammar
    assert "integer" in grammar


async def test_usage_is_the_same_in_every_api(thinking: Running, answer: dict[str, str]) -> None:
    answer["text"] = "<think>\nI know.\n</think>\n\nSo be it."
    model = {"model": MODEL}
    usage = (await ask(thinking, tools=None))["usage"]
    num_input, num_output = usage["prompt_tokens"], usage["completion_tokens"]
    num_reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 1 < num_reasoning < num_output
    _, response = await thinking.post("/v1/responses", model | {"input": HELLO})
    assert response["usage"] == {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": num_input + num_output,
    }
    _, message = await thinking.post("/v1/messages", model | {"messages": HELLO, "max_tokens": 100})
    counts = message["usage"]
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert counts["input_tokens"] + counts["cache_read_input_tokens"] == num_input
    assert (counts["cache_read_input_tokens"], counts["output_tokens"]) == (cached, num_output)
    _, ollama = await thinking.post("/api/chat", model | {"messages": HELLO, "stream": False})
    assert (ollama["message"]["thinking"], ollama["message"]["content"]) == ("I know.", "So be it.")
    assert (ollama["prompt_eval_count"], ollama["eval_count"]) == (num_input, num_output)


async def test_a_budget_of_thinking_reaches_the_engine_from_every_api(
    thinking: Running, answer: dict[str, str]
) -> None:
    answer["text"] = "ok"
    await ask(thinking, tools=None, thinking_token_budget=5)
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 5}}
    status, _ = await thinking.post("/v1/messages", body)
    assert status == 200
    first, second = (request.params.thinking for request in thinking.engine.requests[-2:])
    assert first is not None
    assert first == second
    assert (first.max_tokens, first.ends) == (5, ("</think>",))
