from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from fastserve.engine.fake import Script
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.writers.fastchat import FastChatWriter
from tests.worker.conftest import MODEL, Running, RunWorker, until

Say = Callable[[str], Script]
PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "I am fine, thank you."


async def stream(running: Running, body: Any) -> list[dict[str, Any]]:
    async with running.http.post(running.url + "/worker_generate_stream", json=body) as response:
        assert response.status == 200
        raw = await response.read()
    assert raw.endswith(b"\0")
    return [json.loads(record) for record in raw[:-1].split(b"\0")]


async def test_stream_is_cumulative(run_worker: RunWorker, say: Say, tokenizer: Tokenizer) -> None:
    async with run_worker(say(ANSWER)) as running:
        records = await stream(running, {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 64, "echo": False})
        texts = [record["text"] for record in records]
        assert len(records) > 4
        assert texts[-1] == ANSWER
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert {record["error_code"] for record in records} == {0}
        assert [record["finish_reason"] for record in records] == [None] * (len(records) - 1) + ["stop"]
        prompt_ids = tokenizer.encode(PROMPT, add_special_tokens=False)
        usage = records[-1]["usage"]
        assert usage["prompt_tokens"] == len(prompt_ids)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert running.engine.requests[0].prompt_ids == prompt_ids


async def test_generate_is_the_last_record_and_echoes_by_default(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(ANSWER)) as running:
        _, record = await running.post("/worker_generate", {"prompt": "Q: "})
        assert record["text"] == "Q: " + ANSWER
        assert record["finish_reason"] == "stop"
        assert running.engine.requests[0].params.max_tokens == 256
        _, record = await running.post("/worker_generate", {"prompt": "Q: ", "echo": False, "max_new_tokens": 3})
        assert record["finish_reason"] == "length"
        assert ANSWER.startswith(record["text"])
        _, record = await running.post("/worker_generate", {"prompt": "Q", "echo": False, "stop": [",", ""]})
        assert (record["text"], record["finish_reason"]) == ("I am fine", "stop")
        _, record = await running.post("/worker_generate", {"prompt": "Q", "echo": False, "logprobs": 1})
        *tokens, end = record["logprobs"]["tokens"]
        assert ("".join(tokens), end) == (ANSWER, "<|im_end|>")
        assert len(record["logprobs"]["token_logprobs"]) == len(record["logprobs"]["text_offset"])
        _, record = await running.post("/worker_generate", {"prompt": "Q: ", "logprobs": 1})
        logprobs = record["logprobs"]
        assert "".join(logprobs["tokens"][:-1]) == record["text"] == "Q: " + ANSWER
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert all(value < 0 for value in logprobs["token_logprobs"][1:])
        params = {"prompt": "Q", "top_k": -1, "top_p": 1.0, "presence_penalty": 0.0, "best_of": 1, "stop": ["", ""]}
        _, record = await running.post("/worker_generate", params | {"stop_token_ids": None, "use_beam_search": False})
        assert record["error_code"] == 0


async def test_routes_that_the_api_server_calls(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    async with run_worker(max_model_len=512, model_names=("a", "b")) as running:
        _, status = await running.post("/worker_get_status", None)
        assert (status["model_names"], status["speed"], status["queue_length"]) == (["a", "b"], 1, 0)
        assert (await running.post("/model_details", {"model": "a"}))[1] == {"context_length": 512}
        count = len(tokenizer.encode("hello you", add_special_tokens=True))
        assert (await running.post("/count_token", {"prompt": "hello you"}))[1] == {"count": count, "error_code": 0}
        assert (await running.post("/count_token", {}))[0] == 400
        _, conv = await running.post("/worker_get_conv_template", {"model": "a"})
        assert (conv["conv"]["sep_style"], conv["conv"]["messages"]) == (5, [])
        _, record = await running.post("/worker_get_embeddings", {"input": ["x"]})
        assert record["text"].startswith("The model 'a' does not support embeddings")
        assert record["error_code"] != 0


async def test_a_prompt_by_fastchats_rule_becomes_the_templates(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    async with run_worker() as running:
        conv = (await running.post("/worker_get_conv_template", None))[1]["conv"]
        prompt = conv["system_template"].format(system_message=conv["system_message"])
        prompt += conv["roles"][0] + "hello" + conv["sep"] + conv["roles"][1]
        await running.post("/worker_generate", {"prompt": prompt})
        await running.post("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]})
        by_fastchat, by_openai = running.engine.requests
        assert by_fastchat.prompt_ids == by_openai.prompt_ids


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({}, 40302, "prompt"),
        ({"prompt": "x", "temperature": 9}, 40302, "temperature"),
        ({"prompt": "word " * 600}, 40303, "maximum context length"),
        ({"prompt": "x", "max_new_tokens": -1}, 40302, "'max_new_tokens': -1"),
        ({"prompt": "x", "echo": "no"}, 40302, "'echo'"),
        ({"prompt": 5}, 40302, "'prompt': 5. Give a string."),
        ({"prompt": "x", "max_new_tokens": False}, 40302, "'max_new_tokens': false"),
        ({"prompt": "x", "stop": False}, 40302, "'stop': false"),
        ({"prompt": "x", "stop": ["", 0]}, 40302, "'stop': [0]"),
        ({"prompt": "x", "best_of": 2}, 40302, "'best_of': 2. This route generates one choice: leave it out, or give"),
        ({"prompt": "x", "best_of": True}, 40302, "'best_of': true. This route generates one choice"),
        ({"prompt": "x", "best_of": "many"}, 40302, "'best_of': \"many\". This route generates one choice"),
        ({"prompt": "x", "use_beam_search": True}, 40302, "use_beam_search"),
        ({"prompt": "x", "images": ["data:"]}, 40302, "images"),
        ([1], 40302, "JSON object"),
    ],
)
async def test_errors_are_records(run_worker: RunWorker, body: Any, code: int, words: str) -> None:
    async with run_worker(max_model_len=512) as running:
        status, record = await running.post("/worker_generate", body)
        assert (status, record["error_code"]) == (200, code)
        assert words in record["text"]
        assert await stream(running, body) == [record]


async def test_a_defect_is_a_record_too(run_worker: RunWorker, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise LookupError("a defect")

    async with run_worker(say(ANSWER)) as running:
        monkeypatch.setattr(FastChatWriter, "_record", fail)
        for record in (
            (await running.post("/worker_generate", {"prompt": "x"}))[1],
            *(await stream(running, {"prompt": "x"})),
        ):
            assert (record["error_code"], "defect" in record["text"]) == (50001, False)
        await running.idle()


async def test_an_answer_that_is_not_streamed_is_written_once(
    run_worker: RunWorker, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = FastChatWriter._record

    def count(*args: Any) -> Any:
        written.append(args)
        return write(*args)

    async with run_worker(say(ANSWER)) as running:
        monkeypatch.setattr(FastChatWriter, "_record", count)
        body = {"prompt": "x", "echo": False, "logprobs": 5}
        assert (await running.post("/worker_generate", body))[1]["text"] == ANSWER
        assert len(written) == 1


async def test_a_full_queue_and_a_dead_engine_are_records_too(run_worker: RunWorker) -> None:
    async with run_worker(limit_worker_concurrency=1, queue_size=0, first_token_s=0.3) as running:
        first = asyncio.create_task(running.post("/worker_generate", {"prompt": "x", "max_new_tokens": 1000}))
        await until(lambda: running.runtime.admission.running == 1)
        status, record = await running.post("/worker_generate", {"prompt": "x"})
        assert (status, record["error_code"]) == (200, 42903)
        running.engine.die("gone")
        status, record = await first
        assert (status, record["error_code"]) == (200, 50001)
        assert "gone" in record["text"]
