"""S-LoRA's routes on the worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.engine.fake import Script
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import MODEL, Running, RunWorker
from tests.worker.test_adapters import make_adapter, say_adapter

__all__ = ["say_adapter"]

Say = Callable[[str], Script]
ANSWER = "I am fine, thank you. And you? 你好 🙂"
LONG: dict[str, Any] = {"max_new_tokens": 64}


async def events(running: Running, body: Any) -> list[Any]:
    async with running.http.post(running.url + "/generate_stream", json=body) as response:
        assert response.status == 200, await response.text()
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = (await response.read()).decode()
    lines = [line for line in raw.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data:") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


async def test_an_answer_has_its_text_and_its_number_of_tokens(
    run_worker: RunWorker, say: Say, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(ANSWER, add_special_tokens=False)
    async with run_worker(say(ANSWER)) as running:
        status, answer = await running.post("/generate", {"inputs": "hello", "parameters": LONG})
        assert status == 200
        assert answer == {"generated_text": [ANSWER], "count_output_tokens": len(ids) + 1}
        body = {"inputs": "hello", "parameters": LONG | {"return_details": True}}
        _, answer = await running.post("/generate", body)
        tokens = answer["tokens"]
        assert [token["id"] for token in tokens[:-1]] == ids
        assert "".join(token["text"] for token in tokens) == ANSWER
        assert [token["special"] for token in tokens] == [False] * len(ids) + [True]
        assert all(token["logprob"] < 0 for token in tokens)


@pytest.mark.parametrize("interval", [1, 3])
async def test_a_stream_has_an_event_for_each_token(
    run_worker: RunWorker, say: Say, tokenizer: Tokenizer, interval: int
) -> None:
    ids = tokenizer.encode(ANSWER, add_special_tokens=False)
    async with run_worker(say(ANSWER), stream_interval=interval) as running:
        found = await events(running, {"inputs": "hello", "parameters": LONG})
        assert [item["token"]["id"] for item in found[:-1]] == ids
        assert "".join(item["token"]["text"] for item in found) == ANSWER
        body = {"inputs": "hello", "parameters": LONG | {"return_details": True}}
        assert [item["token"] for item in found] == (await running.post("/generate", body))[1]["tokens"]
        pieces = [tokenizer.token_bytes(token_id).decode(errors="ignore") for token_id in ids]
        assert [item["token"]["text"] for item in found[:5]] == pieces[:5]
        assert [item["finished"] for item in found] == [False] * len(ids) + [True]
        assert all(item["generated_text"] is None and item["details"] is None for item in found)
        found = await events(running, {"inputs": "hello", "parameters": {"max_new_tokens": 3}})
        assert [item["finished"] for item in found] == [False, False, True]


async def test_a_stop_sequence_ends_the_answer_and_is_part_of_it(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(ANSWER)) as running:
        for stop, text in (("thank", "I am fine, thank"), (["zap", "d you? "], "I am fine, thank you. And you? ")):
            body = {"inputs": "hello", "parameters": LONG | {"stop_sequences": stop}}
            _, answer = await running.post("/generate", body)
            assert answer["generated_text"] == [text]
            found = await events(running, body)
            assert "".join(item["token"]["text"] for item in found) == text
            assert [item["finished"] for item in found] == [False] * (len(found) - 1) + [True]


async def test_parameters_reach_the_engine_with_slora_s_defaults(run_worker: RunWorker, say: Say) -> None:
    given = {"do_sample": True, "temperature": 0.7, "top_p": 0.5, "top_k": 5, "presence_penalty": 0.3}
    given |= {"frequency_penalty": 0.4, "max_new_tokens": 50, "ignore_eos": True}
    async with run_worker(say(ANSWER)) as running:
        body = {"inputs": "x", "parameters": given, "req_id": "abc", "model_dir": "/models/other"}
        assert (await running.post("/generate", body))[0] == 200
        params = running.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.7, 0.5, 5, 50)
        assert (params.presence_penalty, params.frequency_penalty, params.stop_token_ids) == (0.3, 0.4, ())
        assert (await running.post("/generate", {"inputs": "x", "parameters": {"do_sample": True}}))[0] == 200
        params = running.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
        assert params.repetition_penalty == 1.0
        assert (await running.post("/generate", {"inputs": "x", "parameters": {"temperature": 0.7}}))[0] == 200
        assert running.engine.requests[-1].params.temperature == 0.0


async def test_lora_dir_is_a_path_as_given_or_a_name(
    run_worker: RunWorker, say_adapter: Script, tmp_path: Path
) -> None:
    one = str(make_adapter(tmp_path / "one"))
    three = str(make_adapter(tmp_path / "three"))
    dirs = (one, f"{one}-2", f"second={three}/")
    async with run_worker(say_adapter, lora_dirs=dirs) as running:
        names = {one: "one", f"{one}-2": "one-2", f"{three}/": "second", "one": "one", "second": "second"}
        for lora_dir, name in names.items():
            _, answer = await running.post("/generate", {"inputs": "x", "lora_dir": lora_dir})
            assert answer["generated_text"] == [name], lora_dir
            found = await events(running, {"inputs": "x", "lora_dir": lora_dir})
            assert "".join(item["token"]["text"] for item in found) == name
        for body in ({"inputs": "x"}, {"inputs": "x", "lora_dir": None}):
            assert (await running.post("/generate", body))[1]["generated_text"] == ["base"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("lora_dir", ["", "two", MODEL, "../one", "one/", "x" * 5000, "a\0b\n"])
async def test_an_unknown_lora_dir_is_a_404_that_lists_what_there_is(
    run_worker: RunWorker, tmp_path: Path, path: str, lora_dir: str
) -> None:
    one = str(make_adapter(tmp_path / "one"))
    async with run_worker(lora_dirs=(one,)) as running:
        status, answer = await running.post(path, {"inputs": "x", "lora_dir": lora_dir})
        assert (status, answer["error"]["param"]) == (404, "lora_dir")
        assert "Served: one." in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 400
        assert not running.engine.requests


BAD: dict[str, tuple[Any, str, str]] = {
    "no inputs": ({}, "inputs", "Missing"),
    "inputs that are a list": ({"inputs": ["a"]}, "inputs", "string"),
    "parameters that are a list": ({"inputs": "a", "parameters": [1]}, "parameters", "object"),
    "an unknown parameter": ({"inputs": "a", "parameters": {"zap": 1}}, "parameters", '"zap"'),
    "no new tokens": ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "max_new_tokens", "0"),
    "new tokens as text": ({"inputs": "a", "parameters": {"max_new_tokens": "9"}}, "max_new_tokens", "integer"),
    "a temperature of a greedy answer": ({"inputs": "a", "parameters": {"temperature": "x"}}, "temperature", "number"),
    "a top_k out of range": ({"inputs": "a", "parameters": {"top_k": -5}}, "top_k", "-5"),
    "sampling of maybe": ({"inputs": "a", "parameters": {"do_sample": 1}}, "do_sample", "true or false"),
    "an empty stop": ({"inputs": "a", "parameters": {"stop_sequences": [""]}}, "stop_sequences", "empty"),
    "details of maybe": ({"inputs": "a", "parameters": {"return_details": "x"}}, "return_details", "true or false"),
    "an adapter that is a number": ({"inputs": "a", "lora_dir": 5}, "lora_dir", "5"),
    "too long inputs": ({"inputs": "hello " * 5000}, "inputs", "tokens"),
}


async def test_errors_name_the_field_before_a_stream_begins(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(ANSWER)) as running:
        for case, (body, param, part) in BAD.items():
            for path in ("/generate", "/generate_stream"):
                status, answer = await running.post(path, body)
                assert (status, answer["error"]["param"]) == (400, param), case
                assert part in answer["error"]["message"], case
        assert not running.engine.requests


async def test_a_stream_that_fails_ends_with_an_error(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("word " * 200, add_special_tokens=False)

    def script(request: EngineRequest, info: EngineInfo) -> Sequence[int]:
        return ids

    async with run_worker(script, token_s=0.02) as running:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 200}}
        async with running.http.post(running.url + "/generate_stream", json=body) as response:
            await response.content.readline()
            running.engine.die()
            raw = (await response.read()).decode()
        last = json.loads(raw.rpartition("data:")[2])
        assert last["finished"] == -1
        assert last["error"]["message"]
