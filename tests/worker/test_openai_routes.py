from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from fastserve.engine.fake import Script, noise
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import MODEL, Running, RunWorker

Say = Callable[[str], Script]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TEXT = "The answer is 12, and that is all there is to say about it."


async def sse(running: Running, path: str, body: dict[str, Any]) -> list[str]:
    """The events of a stream as sent, including comments."""
    async with running.http.post(running.url + path, json=body) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = (await response.read()).decode()
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


async def test_models(run_worker: RunWorker) -> None:
    async with run_worker(model_names=("a", "b")) as running:
        assert [model.id async for model in running.openai.models.list()] == ["a", "b"]


async def test_chat(run_worker: RunWorker, say: Say, tokenizer: Tokenizer) -> None:
    async with run_worker(say(TEXT)) as running:
        answer = await running.openai.chat.completions.create(
            model=MODEL, messages=HELLO, temperature=0, extra_headers={"x-request-id": "my-id-1"}
        )
        assert answer.id == "chatcmpl-my-id-1"
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.content == TEXT
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(tokenizer.encode(TEXT, add_special_tokens=False)) + 1
        sent = running.engine.requests[0]
        assert answer.usage.prompt_tokens == len(sent.prompt_ids)
        assert tokenizer.decode(sent.prompt_ids).split() == ["user", "hello", "assistant"]
        assert sent.params.temperature == 0
        assert sent.params.stop_token_ids == tokenizer.eos_token_ids
        assert len(sent.prompt_ids) + sent.params.max_tokens == 2048


async def test_chat_stream_is_the_same_text(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(TEXT)) as running:
        stream = await running.openai.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert len({chunk.id for chunk in chunks}) == 1
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        first, *middle, last, usage = chunks
        assert first.choices[0].delta.role == "assistant"
        assert not first.choices[0].delta.content
        assert len(middle) > 3
        assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == TEXT
        assert all(chunk.choices[0].finish_reason is None for chunk in [first, *middle])
        assert last.choices[0].finish_reason == "stop"
        assert usage.choices == []
        whole = await running.openai.chat.completions.create(model=MODEL, messages=HELLO)
        assert usage.usage is not None
        assert whole.usage == usage.usage


async def test_the_wire_of_a_stream(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say("hi")) as running:
        events = await sse(running, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "stream": True})
        assert events[-1] == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        assert all("usage" not in chunk for chunk in chunks)
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": ""},
            {"content": "hi"},
            {},
        ]
        events = await sse(running, "/v1/completions", {"model": MODEL, "prompt": "x", "stream": True})
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hi", ""]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_stream_interval(run_worker: RunWorker) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 21, "temperature": 0}
    counts = {}
    for interval in (1, 5):
        async with run_worker(noise, stream_interval=interval, token_s=0.004) as running:
            events = await sse(running, "/v1/completions", body)
            counts[interval] = len([event for event in events if '"text":""' not in event]) - 1
    assert counts[1] > 14
    assert 4 <= counts[5] <= 6  # after tokens 1, 6, 11, 16 and at the end


async def test_two_choices_are_interleaved_and_whole(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.002) as running:
        arguments: dict[str, Any] = {"model": MODEL, "messages": HELLO, "n": 2, "seed": 5, "max_tokens": 40}
        arguments["temperature"] = 1.0
        whole = await running.openai.chat.completions.create(**arguments)
        texts = [choice.message.content for choice in whole.choices]
        assert [choice.index for choice in whole.choices] == [0, 1]
        assert texts[0] != texts[1]
        stream = await running.openai.chat.completions.create(stream=True, **arguments)
        order, streamed = [], ["", ""]
        async for chunk in stream:
            choice = chunk.choices[0]
            order.append(choice.index)
            streamed[choice.index] += choice.delta.content or ""
        assert streamed == texts
        assert order != sorted(order)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 80
        assert whole.usage.prompt_tokens == len(running.engine.requests[0].prompt_ids)
        assert [request.choice for request in running.engine.requests] == [0, 1, 0, 1]


async def test_stop_strings(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(TEXT)) as running:
        create = running.openai.chat.completions.create
        answer = await create(model=MODEL, messages=HELLO, stop=["never", " and that"])
        assert answer.choices[0].message.content == "The answer is 12,"
        assert answer.choices[0].finish_reason == "stop"
        stream = await create(model=MODEL, messages=HELLO, stop=" and that", stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "The answer is 12,"
        answer = await create(
            model=MODEL, messages=HELLO, stop="12", extra_body={"include_stop_str_in_output": True, "min_tokens": 2}
        )
        assert answer.choices[0].message.content == "The answer is 12"
        await running.idle()
        assert running.engine.stats.aborted == 3, "the engine stops at once"


async def test_stop_token_ids_and_ignore_eos(run_worker: RunWorker, say: Say, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    async with run_worker(say(TEXT)) as running:
        answer = await running.openai.completions.create(
            model=MODEL, prompt="x", max_tokens=100, extra_body={"stop_token_ids": [ids[3]]}
        )
        assert answer.choices[0].text == tokenizer.decode(ids[: ids.index(ids[3])])
        assert answer.choices[0].finish_reason == "stop"
        answer = await running.openai.completions.create(
            model=MODEL, prompt="x", max_tokens=len(ids) + 5, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].finish_reason == "length"
        assert running.engine.requests[-1].params.stop_token_ids == ()


async def test_chat_logprobs(run_worker: RunWorker, say: Say) -> None:
    text = "naïve 世界 say 12"
    async with run_worker(say(text)) as running:
        arguments: dict[str, Any] = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2}
        answer = await running.openai.chat.completions.create(**arguments)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode() == text
        assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
        assert all(entry.top_logprobs[0].token == entry.token for entry in logprobs.content)
        stream = await running.openai.chat.completions.create(stream=True, **arguments)
        streamed: list[Any] = []
        async for chunk in stream:
            if chunk.choices[0].logprobs is not None:
                streamed += chunk.choices[0].logprobs.content or []
        assert streamed == logprobs.content
        bare = await running.openai.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True)
        assert bare.choices[0].logprobs is not None
        assert bare.choices[0].logprobs.content is not None
        assert bare.choices[0].logprobs.content[0].top_logprobs == []
        cut = await running.openai.chat.completions.create(stop=" say", **arguments)
        assert cut.choices[0].logprobs is not None
        assert cut.choices[0].logprobs.content is not None
        left = b"".join(bytes(entry.bytes or []) for entry in cut.choices[0].logprobs.content).decode()
        assert cut.choices[0].message.content == left == "naïve 世界"


async def test_completions(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    async with run_worker() as running:  # the echoing engine
        create = running.openai.completions.create
        answer = await create(model=MODEL, prompt=["one two", "three"], max_tokens=50, n=2)
        assert [choice.text for choice in answer.choices] == ["one two", "one two", "three", "three"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.id.startswith("cmpl-")
        ids = tokenizer.encode("four five", add_special_tokens=False)
        assert (await create(model=MODEL, prompt=ids)).choices[0].text == "four five"
        assert [one.text for one in (await create(model=MODEL, prompt=[ids, ids])).choices] == ["four five"] * 2
        assert (await create(model=MODEL, prompt="six", echo=True)).choices[0].text == "sixsix"
        stream = await create(model=MODEL, prompt="six", echo=True, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "sixsix"
        long = await create(model=MODEL, prompt="word " * 30)
        assert long.usage is not None
        assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (16, "length")


async def test_completion_logprobs(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say("one 世 two")) as running:
        answer = await running.openai.completions.create(model=MODEL, prompt="x", logprobs=2)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.text_offset is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.text_offset[0] == 0
        assert logprobs.text_offset == sorted(logprobs.text_offset)
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
        assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


async def test_too_long_and_too_large(run_worker: RunWorker) -> None:
    async with run_worker(noise, max_model_len=64) as running:
        with pytest.raises(openai.BadRequestError) as caught:
            await running.openai.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "word " * 100}]
            )
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"
        assert "maximum context length is 64 tokens" in caught.value.message
        answer = await running.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1000)
        assert answer.usage is not None
        assert answer.usage.total_tokens == 64
        assert answer.choices[0].finish_reason == "length"


CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO}


async def test_roles_and_parts(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    async with run_worker() as running:
        status, _ = await running.post(
            "/v1/chat/completions",
            {
                "model": MODEL,
                "messages": [
                    {"role": "developer", "content": "be brief"},
                    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
                ],
            },
        )
        assert status == 200
        prompt = tokenizer.decode(running.engine.requests[0].prompt_ids)
        assert prompt.split() == ["system", "be", "brief", "user", "one", "two", "assistant"]


async def test_a_history_with_tool_calls(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    function = {"name": "calculator", "arguments": '{"expression": "7 + 5"}'}
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "7 + 5?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "12"},
    ]
    async with run_worker() as running:
        status, _ = await running.post("/v1/chat/completions", {"model": MODEL, "messages": history})
        assert status == 200
        prompt = tokenizer.decode(running.engine.requests[0].prompt_ids)
        assert '"arguments": {"expression": "7 + 5"}' in prompt, "as an object, not as text"
        for broken in ({"name": "x", "arguments": "{"}, {"arguments": "{}"}, "x"):
            history[1]["tool_calls"] = [{"function": broken}]
            status, answer = await running.post("/v1/chat/completions", {"model": MODEL, "messages": history})
            assert status == 400
            assert answer["error"]["param"].startswith("messages.1.tool_calls")


async def test_sampling_reaches_the_engine(run_worker: RunWorker) -> None:
    async with run_worker(seed=77) as running:
        asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.25}
        asked |= {"typical_p": 0.7}
        asked |= {"frequency_penalty": -0.5, "repetition_penalty": 1.5}
        await running.post("/v1/chat/completions", CHAT | asked | {"logit_bias": {"5": 3}, "seed": -1})
        params = running.engine.requests[-1].params
        assert {name: getattr(params, name) for name in asked} == asked
        assert (params.logit_bias, params.seed) == ({5: 3.0}, 2**63 - 1)
        await running.post("/v1/chat/completions", CHAT | {"top_p": 0, "top_k": -1})
        params = running.engine.requests[-1].params
        assert (params.temperature, params.top_k, params.seed) == (0.0, 0, 77)
    async with run_worker() as running:
        for _ in range(2):
            await running.post("/v1/chat/completions", CHAT)
        first, second = (request.params.seed for request in running.engine.requests)
        assert first != second


async def test_without_a_chat_template(run_worker: RunWorker, model_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    async with run_worker(folder=tmp_path) as running:
        status, answer = await running.post("/v1/chat/completions", CHAT)
        assert status == 400
        assert "--chat-template" in answer["error"]["message"]
        assert (await running.post("/v1/completions", {"model": MODEL, "prompt": "x"}))[0] == 200
    own = tmp_path / "own.jinja"
    own.write_text("Q: {{ messages[0].content }} A:")
    async with run_worker(folder=tmp_path, chat_template=str(own)) as running:
        status, answer = await running.post("/v1/chat/completions", CHAT)
        assert answer["choices"][0]["message"]["content"] == "Q: hello A:"
