"""rtp-llm's routes on the worker."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from fastserve.engine.fake import Script
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import Running, RunWorker

Say = Callable[[str], Script]
ANSWER = "I am fine, thank you. And you?"


async def events(running: Running, body: Any) -> list[Any]:
    async with running.http.post(running.url + "/", json=body) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = (await response.read()).decode()
    lines = [line.removeprefix("data:") for line in raw.split("\r\n\r\n") if line and not line.startswith(":")]
    assert lines.pop() == "[done]"
    return [json.loads(line) for line in lines]


async def test_a_prompt_is_answered(run_worker: RunWorker, say: Say, tokenizer: Tokenizer) -> None:
    async with run_worker(say(ANSWER)) as running:
        status, answer = await running.post("/", {"prompt": "hello", "generate_config": {"max_new_tokens": 64}})
        assert status == 200
        assert (answer["response"], answer["finished"]) == (ANSWER, True)
        info = answer["aux_info"]
        assert info["input_len"] == len(tokenizer.encode("hello", add_special_tokens=True))
        assert info["output_len"] == len(tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
        assert info["cost_time"] > 0


async def test_prompts_of_a_batch_and_sequences_of_a_prompt(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(ANSWER)) as running:
        _, answer = await running.post("/", {"prompt_batch": ["one", "two"]})
        assert [item["response"] for item in answer["response_batch"]] == [ANSWER, ANSWER]
        assert answer["response_batch"][0]["finished"] is True
        _, answer = await running.post("/", {"prompt": "one", "generate_config": {"num_return_sequences": 2}})
        assert answer["response"] == [ANSWER, ANSWER]
        assert len(answer["aux_info"]) == 2
        _, answer = await running.post("/", {"prompt_batch": ["one"], "num_return_sequences": 2})
        assert answer["response_batch"][0]["response"] == [ANSWER, ANSWER]


async def test_a_stream_has_the_whole_text_so_far_or_the_next_text(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(ANSWER)) as running:
        found = await events(running, {"prompt": "hello", "yield_generator": True})
        texts = [item["response"] for item in found]
        assert len(texts) > 4
        assert texts[-1] == ANSWER
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert [item["finished"] for item in found] == [False] * (len(found) - 1) + [True]
        config = {"yield_generator": True, "return_incremental": True}
        found = await events(running, {"prompt": "hello", "generate_config": config})
        assert "".join(item["response"] for item in found) == ANSWER
        assert len(found) > 4
        found = await events(running, {"prompt_batch": ["a", "b"], "generate_config": config})
        for at in range(2):
            assert "".join(item["response_batch"][at]["response"] for item in found) == ANSWER


async def test_parameters_reach_the_engine(run_worker: RunWorker, say: Say, tokenizer: Tokenizer) -> None:
    async with run_worker(say(ANSWER)) as running:
        stop = tokenizer.encode(" thank", add_special_tokens=False)
        config = {"top_k": 5, "top_p": 0.5, "temperature": 0.7, "repetition_penalty": 1.1, "random_seed": 9}
        config |= {"min_new_tokens": 2, "max_new_tokens": 50, "num_beams": 1, "calculate_loss": 0}
        _, answer = await running.post("/", {"prompt": "x", "generate_config": config | {"stop_words_list": [stop]}})
        assert answer["response"] == "I am fine,"
        params = running.engine.requests[0].params
        assert (params.top_k, params.top_p, params.temperature, params.seed) == (5, 0.5, 0.7, 9)
        assert (params.min_tokens, params.max_tokens, params.repetition_penalty) == (2, 50, 1.1)
        _, answer = await running.post("/", {"prompt": "x", "stop_words_str": [","], "print_stop_words": True})
        assert answer["response"] == "I am fine,"
        assert running.engine.requests[1].params.max_tokens == 1000


BAD: dict[str, tuple[Any, str, str]] = {
    "no prompt": ({}, "prompt", "Missing"),
    "a prompt that is a number": ({"prompt": 5}, "prompt", "string"),
    "an empty batch": ({"prompt_batch": []}, "prompt_batch", "array of strings"),
    "a batch with a number": ({"prompt_batch": ["a", 5]}, "prompt_batch", "array of strings"),
    "a chat": ({"messages": []}, "messages", "/v1/chat/completions"),
    "a config that is no object": ({"prompt": "a", "generate_config": 5}, "generate_config", "object"),
    "an unknown field of the config": ({"prompt": "a", "generate_config": {"zap": 1}}, "generate_config", '"zap"'),
    "no new tokens": ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens", "0"),
    "new tokens as text": ({"prompt": "a", "max_new_tokens": "9"}, "max_new_tokens", "integer"),
    "a temperature out of range": ({"prompt": "a", "temperature": 9}, "temperature", "9"),
    "a top_p for each prompt": ({"prompt": "a", "top_p": [0.5]}, "top_p", "number"),
    "a seed as text": ({"prompt": "a", "random_seed": "x"}, "random_seed", "integer"),
    "a negative number of sequences": ({"prompt": "a", "num_return_sequences": -1}, "num_return_sequences", "-1"),
    "beams": ({"prompt": "a", "num_beams": 4}, "num_beams", "4"),
    "a loss": ({"prompt": "a", "calculate_loss": 1}, "calculate_loss", "1"),
    "logits": ({"prompt": "a", "generate_config": {"return_logits": True}}, "return_logits", "true"),
    "two adapters": ({"prompt": "a", "adapter_name": ["b", "c"]}, "adapter_name", "one adapter"),
    "stop words that are no list": ({"prompt": "a", "stop_words_str": "x"}, "stop_words_str", "array"),
    "an empty stop word": ({"prompt": "a", "stop_words_str": [""]}, "stop_words_str", "non-empty"),
    "stop ids that are no lists": ({"prompt": "a", "stop_words_list": [5]}, "stop_words_list", "arrays"),
    "a stop id of true": ({"prompt": "a", "stop_words_list": [[True]]}, "stop_words_list", "integers"),
    "a stop id beyond the vocabulary": ({"prompt": "a", "stop_words_list": [[10**9]]}, "stop_words_list", "10000"),
    "next texts without a stream": ({"prompt": "a", "return_incremental": True}, "return_incremental", "yield"),
    "a stream of maybe": ({"prompt": "a", "yield_generator": 1}, "yield_generator", "true or false"),
}


@pytest.mark.parametrize("case", BAD)
async def test_errors_name_the_field_and_the_remedy(run_worker: RunWorker, say: Say, case: str) -> None:
    body, param, part = BAD[case]
    async with run_worker(say(ANSWER)) as running:
        status, answer = await running.post("/", body)
        assert status == 400
        assert answer["error_code"] in (507, 511, 515)
        assert answer["error"]["param"] == param
        assert f"'{param}'" in answer["message"] or param in answer["message"]
        assert part in answer["message"]
        assert not running.engine.requests


async def test_too_long_a_prompt_and_a_full_queue_have_rtp_llms_numbers(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(ANSWER), max_model_len=8) as running:
        status, answer = await running.post("/", {"prompt": "hello " * 50})
        assert (status, answer["error_code"]) == (400, 511)


async def test_health_status_and_tokenizer(run_worker: RunWorker, say: Say, tokenizer: Tokenizer) -> None:
    async with run_worker(say(ANSWER), limit_worker_concurrency=3) as running:
        for path in ("/status", "/health_check", "/GraphService/cm2_status", "/SearchService/cm2_status", "/health"):
            async with running.http.post(running.url + path) as response:
                assert (response.status, await response.json()) == (200, "ok"), path
        async with running.http.get(running.url + "/") as response:
            assert await response.json() == {"status": "home"}
        async with running.http.get(running.url + "/worker_status") as response:
            answer = await response.json()
        assert (answer["available_concurrency"], answer["alive"]) == (3, True)
        assert 0 < answer["available_kv_cache"] <= answer["total_kv_cache"]
        status, answer = await running.post("/tokenizer/encode", {"prompt": "hello there"})
        assert (status, answer["token_ids"]) == (200, tokenizer.encode("hello there", add_special_tokens=True))
        assert "".join(answer["tokens"]).endswith("hello there")
        for body in ({}, {"prompt": 5}, {"prompt": ["a"]}, {"prompt": "a", "return_offsets_mapping": True}):
            status, answer = await running.post("/tokenizer/encode", body)
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
