"""Limits on the tokens of a prompt and on the sequences of a request."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fastserve.engine.fake import FakeOptions
from fastserve.text.fast_tokenizer import FastTokenizer
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import MODEL, RunWorker


async def test_tokens_that_the_model_does_not_have_are_refused(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    last = max(tokenizer.encode("hello", add_special_tokens=False))

    def shrink(options: FakeOptions) -> None:
        options.vocab_size = last

    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    async with run_worker(prepare=shrink) as running:
        for path, body, param in (
            ("/v1/completions", {"model": MODEL, "prompt": "hello"}, "prompt"),
            ("/v1/completions", {"model": MODEL, "prompt": ["a", "hello"]}, "prompt"),
            ("/v1/chat/completions", chat, "messages"),
        ):
            status, answer = await running.post(path, body)
            assert (status, answer["error"]["param"]) == (400, param)
            assert f"'{param}'" in answer["error"]["message"]
            assert f"token id {last}" in answer["error"]["message"]
        _, answer = await running.post("/worker_generate", {"model": MODEL, "prompt": "hello"})
        assert (answer["error_code"], str(last) in answer["text"]) == (40302, True)
        assert not running.engine.requests


async def test_end_tokens_that_the_model_does_not_have_are_left_out(run_worker: RunWorker) -> None:
    def add(options: FakeOptions) -> None:
        options.eos_token_ids = (*options.eos_token_ids, options.vocab_size, -1)

    async with run_worker(prepare=add) as running:
        assert (await running.post("/v1/completions", {"model": MODEL, "prompt": "hello"}))[0] == 200
        (request,) = running.engine.requests
        assert request.params.stop_token_ids
        assert all(0 <= token_id < running.runtime.info.vocab_size for token_id in request.params.stop_token_ids)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["a"] * 9}, "prompt"),
        ("/v1/completions", {"prompt": [[5]] * 3, "n": 3}, "n"),
        ("/v1/completions", {"prompt": [[5]] * 3, "n": 2, "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": "a", "best_of": 9}, "best_of"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 9}, "n"),
    ],
)
async def test_one_request_brings_no_more_sequences_than_run_at_once(
    run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    async with run_worker(max_num_seqs=8) as running:
        assert (await running.post("/v1/completions", {"model": MODEL, "prompt": ["a", "b"], "n": 4}))[0] == 200
        monkeypatch.delattr(FastTokenizer, "encode")  # nothing is encoded before the check
        status, answer = await running.post(path, {"model": MODEL} | body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert "at most 8 sequences" in answer["error"]["message"]
        assert "split the request" in answer["error"]["message"]
        assert len(running.engine.requests) == 8


async def test_long_bodies_are_read_and_encoded_off_the_loop(
    run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    encode = FastTokenizer.encode

    def recording(self: FastTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        threads.add(threading.get_ident())
        return encode(self, text, add_special_tokens=add_special_tokens)

    async with run_worker() as running:
        monkeypatch.setattr(FastTokenizer, "encode", recording)
        status, answer = await running.post("/v1/completions", {"model": MODEL, "prompt": ["one", "two", "three"]})
        assert (status, [choice["text"] for choice in answer["choices"]]) == (200, ["one", "two", "three"])
        assert threads == {threading.get_ident()}, "a short body is quicker done than handed over"
        threads.clear()
        prompts = ["a b " * 200] * 20
        status, answer = await running.post("/v1/completions", {"model": MODEL, "prompt": prompts, "max_tokens": 1})
        assert (status, len(answer["choices"])) == (200, 20)
        assert len(threads) == 1
        assert threading.get_ident() not in threads
