"""Fields of requests: what each does to the prompt, to the engine's request, and to the answer. One worker serves most
of the file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.engine.fake import Script
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import MODEL, Running, RunWorker

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "one two three four five six"}
HALVES = "naïve 世界 😀"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(run_worker: RunWorker) -> AsyncIterator[Running]:
    """A worker on the echoing engine."""
    async with run_worker() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def speaker(run_worker: RunWorker, say: Callable[[str], Script]) -> AsyncIterator[Running]:
    """A worker that answers with characters of several tokens."""
    async with run_worker(say(HALVES), trust_request_chat_template=True) as running:
        yield running


async def chat(running: Running, **fields: Any) -> dict[str, Any]:
    status, answer = await running.post("/v1/chat/completions", CHAT | fields)
    assert status == 200, answer
    return answer


async def complete(running: Running, **fields: Any) -> dict[str, Any]:
    status, answer = await running.post("/v1/completions", TEXT | fields)
    assert status == 200, answer
    return answer


async def chunks(running: Running, path: str, body: dict[str, Any]) -> list[tuple[bytes, dict[str, Any]]]:
    """The chunks of a stream, each as sent and parsed."""
    async with running.http.post(running.url + path, json=body | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        events = (await response.read()).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    return [(event + b"\n\n", json.loads(event.removeprefix(b"data: "))) for event in events[:-2]]


def prompt_of(running: Running, tokenizer: Tokenizer) -> str:
    """The last prompt that the engine got, with special tokens."""
    return b"".join(tokenizer.token_bytes(item) for item in running.engine.requests[-1].prompt_ids).decode()


# ---- how messages become a prompt -------------------------------------------------------------------------------


async def test_without_a_generation_prompt(shared: Running, tokenizer: Tokenizer) -> None:
    await chat(shared)
    with_turn = prompt_of(shared, tokenizer)
    await chat(shared, add_generation_prompt=False)
    without = prompt_of(shared, tokenizer)
    assert with_turn.startswith(without)
    assert with_turn.removeprefix(without).strip().endswith("assistant")


@pytest.mark.parametrize("content", ["It is ", "7 + 5 =", " \n", "a\n\n", "世", "<|im_end|>"])
async def test_the_final_message_is_continued_as_it_stands(shared: Running, tokenizer: Tokenizer, content: str) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": content}]
    await chat(shared, messages=messages, continue_final_message=True)
    assert prompt_of(shared, tokenizer).endswith("assistant\n" + content)
    await chat(shared, messages=messages, continue_final_message=True, add_generation_prompt=False)
    status, answer = await shared.post(
        "/v1/chat/completions",
        CHAT | {"messages": messages, "continue_final_message": True, "add_generation_prompt": True},
    )
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")


async def test_a_chat_may_echo_its_final_message(speaker: Running) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "So: "}]
    fields = {"messages": messages, "echo": True, "continue_final_message": True}
    answer = await chat(speaker, **fields)
    assert answer["choices"][0]["message"]["content"] == "So: " + HALVES
    streamed = await chunks(speaker, "/v1/chat/completions", CHAT | fields)
    deltas = [chunk["choices"][0]["delta"] for _, chunk in streamed]
    assert "".join(delta.get("content", "") for delta in deltas) == "So: " + HALVES
    assert (await chat(speaker, echo=True))["choices"][0]["message"]["content"] == HALVES, "a user's is not repeated"


async def test_a_template_of_the_request_needs_permission(
    shared: Running, speaker: Running, tokenizer: Tokenizer
) -> None:
    source = "{{ messages[0].content }}|{{ flavour }}|{{ documents[0].title }}|{{ verbosity }}>"
    fields = {
        "chat_template": source,
        "chat_template_kwargs": {"flavour": "mint"},
        "documents": [{"title": "A", "text": "b"}],
        "verbosity": "low",
    }
    await chat(speaker, **fields)
    assert prompt_of(speaker, tokenizer) == "hello|mint|A|low>"
    status, answer = await shared.post("/v1/chat/completions", CHAT | fields)
    assert (status, answer["error"]["param"]) == (400, "chat_template")
    assert "--trust-request-chat-template" in answer["error"]["message"]
    for broken in ("{% if %}", "{{ x | nofilter }}", "{{ " + "(" * 3000, "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"):
        status, answer = await speaker.post("/v1/chat/completions", CHAT | {"chat_template": broken})
        assert status == 400, broken
        assert answer["error"]["param"] in ("chat_template", "messages")


async def test_a_functions_message_is_a_tools(shared: Running, tokenizer: Tokenizer) -> None:
    messages = [*CHAT["messages"], {"role": "function", "name": "get_weather", "content": "sunny"}]
    await chat(shared, messages=messages)
    as_function = prompt_of(shared, tokenizer)
    assert "sunny" in as_function
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages[-1:] = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "name": "get_weather", "content": "sunny"},
    ]
    await chat(shared, messages=messages)
    as_tool = prompt_of(shared, tokenizer)
    messages[-2:] = [
        {"role": "assistant", "function_call": call["function"]},
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    await chat(shared, messages=messages)
    assert prompt_of(shared, tokenizer) == as_tool


# ---- truncation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "kept"), [(None, slice(-3, None)), ("left", slice(-3, None)), ("right", slice(3))])
async def test_a_prompt_is_cut_at_the_side_named(
    shared: Running, tokenizer: Tokenizer, side: str | None, kept: slice
) -> None:
    ids = tokenizer.encode(TEXT["prompt"], add_special_tokens=True)
    assert len(ids) > 3
    for prompt in (TEXT["prompt"], ids):
        answer = await complete(shared, prompt=prompt, truncate_prompt_tokens=3, truncation_side=side)
        assert shared.engine.requests[-1].prompt_ids == ids[kept]
        assert answer["usage"]["prompt_tokens"] == 3


async def test_a_prompt_beyond_the_context_is_cut_to_what_the_answer_leaves(run_worker: RunWorker) -> None:
    async with run_worker(max_model_len=64) as running:
        words = "word " * 5000
        for fields, expected in (({}, 48), ({"max_tokens": 40}, 24), ({"max_tokens": 100}, 1)):
            await complete(running, prompt=words, truncate_prompt_tokens=-1, **fields)
            assert len(running.engine.requests[-1].prompt_ids) == expected
        long = [{"role": "user", "content": words}]
        answer = await chat(running, messages=long, truncate_prompt_tokens=-1, max_tokens=10)
        assert answer["usage"]["prompt_tokens"] == 54
        assert (await running.post("/v1/completions", TEXT | {"prompt": words}))[0] == 400


# ---- what the engine gets ---------------------------------------------------------------------------------------


async def test_fields_reach_the_engine(shared: Running, tokenizer: Tokenizer) -> None:
    await chat(shared, allowed_token_ids=[4, 5], bad_words=["hello", "hello"], cache_salt="mine")
    request = shared.engine.requests[-1]
    assert request.params.allowed_token_ids == (4, 5)
    spelled = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("hello", " hello")]
    assert request.params.bad_token_ids == tuple(dict.fromkeys(spelled))
    assert request.cache_salt == "mine"


async def test_a_body_may_name_its_request(shared: Running) -> None:
    assert (await chat(shared, request_id="run-7"))["id"] == "chatcmpl-run-7"
    assert (await complete(shared, request_id="run-7"))["id"] == "cmpl-run-7"


async def test_predicted_tokens_are_counted(speaker: Running, tokenizer: Tokenizer) -> None:
    """As the answer has them, in its order: a prefix, what comes after a change, and nothing of another text."""
    answer_ids = tokenizer.encode(HALVES, add_special_tokens=False)
    for text in (HALVES, HALVES[:5], "X" + HALVES[5:], "quite another", ""):
        prediction = {"type": "content", "content": text}
        answer = await chat(speaker, prediction=prediction)
        ids = tokenizer.encode(text, add_special_tokens=False) if text else []
        assert speaker.engine.requests[-1].predicted_ids == ids
        details = answer["usage"]["completion_tokens_details"]
        accepted = details["accepted_prediction_tokens"]
        assert accepted + details["rejected_prediction_tokens"] == len(ids)
        if text == HALVES:
            assert accepted == len(answer_ids)
        streamed = await chunks(
            speaker,
            "/v1/chat/completions",
            CHAT | {"prediction": prediction, "stream_options": {"include_usage": True}},
        )
        assert streamed[-1][1]["usage"]["completion_tokens_details"] == details
        assert "token_ids" not in answer["choices"][0]


# ---- what the answer has ----------------------------------------------------------------------------------------


async def test_logprobs_name_every_byte(speaker: Running) -> None:
    entries = (await chat(speaker, logprobs=True, top_logprobs=3))["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == HALVES
    halves = [entry for entry in entries if entry["token"].startswith("bytes:")]
    assert len(halves) > 3
    for entry in halves:
        assert entry["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
    logprobs = (await complete(speaker, logprobs=3))["choices"][0]["logprobs"]
    named = [token for token in logprobs["tokens"] if token.startswith("bytes:")]
    assert named == [entry["token"] for entry in halves]
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


async def test_tokens_may_be_named_by_their_ids(speaker: Running, tokenizer: Tokenizer) -> None:
    names = [f"token_id:{item}" for item in tokenizer.encode(HALVES, add_special_tokens=False)]
    fields = {"return_tokens_as_token_ids": True}
    entries = (await chat(speaker, logprobs=True, top_logprobs=2, **fields))["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == names
    assert all(top["token"].startswith("token_id:") for entry in entries for top in entry["top_logprobs"])
    logprobs = (await complete(speaker, logprobs=2, **fields))["choices"][0]["logprobs"]
    assert logprobs["tokens"][: len(names)] == names
    assert all(name in top for name, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


@pytest.mark.parametrize("more", [{}, {"stop": "ve"}, {"max_tokens": 3}, {"n": 2}])
async def test_answers_have_their_token_ids(speaker: Running, tokenizer: Tokenizer, more: dict[str, Any]) -> None:
    """All that were generated, the stop token too, streamed and whole; those of usage."""
    fields = {"return_token_ids": True, "seed": 1, **more}
    for path, body in (("/v1/chat/completions", CHAT | fields), ("/v1/completions", TEXT | fields)):
        status, whole = await speaker.post(path, body)
        assert status == 200
        ids = [choice["token_ids"] for choice in whole["choices"]]
        assert sum(map(len, ids)) == whole["usage"]["completion_tokens"]
        if not more:
            assert ids[0][:-1] == tokenizer.encode(HALVES, add_special_tokens=False)
        sent = speaker.engine.requests[-1].prompt_ids
        assert (whole if "chat" in path else whole["choices"][0])["prompt_token_ids"] == sent
        streamed: list[list[int]] = [[] for _ in ids]
        prompts = []
        for _, chunk in await chunks(speaker, path, body):
            (choice,) = chunk["choices"]
            streamed[choice["index"]] += choice.get("token_ids", [])
            prompts += [item["prompt_token_ids"] for item in (chunk, choice) if "prompt_token_ids" in item]
        assert streamed == ids
        assert prompts == [sent] * len(ids)


async def test_every_chunk_may_have_the_usage_so_far(speaker: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        found = [chunk["usage"] for _, chunk in await chunks(speaker, path, body | {"n": 2, "stream_options": options})]
        counts = [usage["completion_tokens"] for usage in found]
        assert counts == sorted(counts)
        assert found[-1] == found[-2]
        assert counts[-1] > 0
        plain = await chunks(speaker, path, body | {"stream_options": {"continuous_usage_stats": True}})
        assert all("usage" not in chunk for _, chunk in plain), "it needs include_usage"


async def test_obfuscated_chunks_do_not_show_the_length_of_their_text(speaker: Running) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT | {"logprobs": 1})):
        options = {"include_obfuscation": True, "include_usage": True}
        found = await chunks(speaker, path, body | {"stream_options": options})
        assert {len(sent) % 64 for sent, chunk in found if chunk["choices"]} == {0}
        assert all(chunk["obfuscation"].isalpha() or not chunk["obfuscation"] for _, chunk in found if chunk["choices"])
        plain = await chunks(speaker, path, body)
        assert all("obfuscation" not in chunk for _, chunk in plain)


async def test_the_service_tier_is_repeated_and_names_of_callers_change_nothing(shared: Running) -> None:
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "safety_identifier": "s", "prompt_cache_key": "k"}
    assert "service_tier" not in await chat(shared, **fields)
    assert (await chat(shared, service_tier="flex"))["service_tier"] == "flex"
    streamed = await chunks(shared, "/v1/completions", TEXT | {"service_tier": "priority"})
    assert {chunk["service_tier"] for _, chunk in streamed} == {"priority"}


async def test_a_request_may_set_the_interval_of_its_stream(shared: Running) -> None:
    prompt = "one two three four five six seven eight nine ten"
    body = TEXT | {"prompt": prompt, "max_tokens": 12}
    every = await chunks(shared, "/v1/completions", body | {"stream_interval": 1})
    few = await chunks(shared, "/v1/completions", body | {"stream_interval": 1000})
    assert len(few) <= 2 < len(every) or len(every) == len(few) == 2  # outputs that came together are one chunk
    assert "".join(chunk["choices"][0]["text"] for _, chunk in few).startswith("one")


# ---- beam search ------------------------------------------------------------------------------------------------


async def test_beam_search_asks_the_engine_for_one_token_of_each_beam(run_worker: RunWorker) -> None:
    def letters(request: EngineRequest, info: EngineInfo) -> list[int]:
        return [300 + len(request.prompt_ids) % 7] * 2

    async with run_worker(letters) as running:
        fields = {"use_beam_search": True, "n": 2, "best_of": 3, "max_tokens": 4, "prompt": ["a b", "c"]}
        answer = await complete(running, **fields)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
        assert all(request.params.max_tokens == 1 for request in running.engine.requests)
        await running.idle()


async def test_a_named_template_ends_answers_with_its_own_marks(
    run_worker: RunWorker, say: Callable[[str], Script], tokenizer: Tokenizer
) -> None:
    async with run_worker(say("Fine.\n### Human: and you?"), conv_template="zero_shot") as running:
        answer = await chat(running, stop=["never"])
        assert answer["choices"][0]["message"]["content"] == "Fine.\n"
        assert prompt_of(running, tokenizer).endswith("### Human: hello\n### Assistant:")
