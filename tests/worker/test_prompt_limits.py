"""Limits on the tokens of a prompt and on the sequences of a request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastserve.engine.contract import EngineRequest, RequestStream
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
    ("path", "body", "param", "words"),
    [
        ("/v1/completions", {"prompt": ["a"] * 33}, "prompt", "at most 32"),
        ("/v1/completions", {"prompt": [[5]] * 11, "n": 3}, "n", "at most 32 sequences"),
        ("/v1/completions", {"prompt": [[5]] * 11, "n": 2, "best_of": 3}, "best_of", "at most 32 sequences"),
        ("/v1/completions", {"prompt": "a", "best_of": 9}, "best_of", "at most 8 sequences"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 9}, "n", "at most 8 sequences"),
    ],
)
async def test_the_sequences_of_one_request_are_bounded(
    run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    async with run_worker(max_num_seqs=8, max_prompts=32) as running:
        monkeypatch.delattr(FastTokenizer, "encode")  # nothing is encoded before the check
        status, answer = await running.post(path, {"model": MODEL} | body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert words in answer["error"]["message"]
        assert not running.engine.requests


async def test_many_prompts_run_a_few_at_a_time(run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_worker(max_num_seqs=8, max_prompts=32) as running:
        generate, now, most = running.engine.generate, 0, 0

        @contextlib.contextmanager
        def counting(request: EngineRequest) -> Iterator[RequestStream]:
            nonlocal now, most
            now += 1
            most = max(most, now)
            try:
                with generate(request) as stream:
                    yield stream
            finally:
                now -= 1

        monkeypatch.setattr(running.engine, "generate", counting)
        prompts = [f"prompt number {index}" for index in range(30)]
        answer = await running.openai.completions.create(model=MODEL, prompt=prompts)
        assert [choice.text for choice in answer.choices] == prompts
        assert [choice.index for choice in answer.choices] == list(range(30))
        assert (now, most) == (0, 8)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(len(request.prompt_ids) for request in running.engine.requests)


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
