"""Preprocessing of long prompts: a bounded number of threads, a bounded queue, and no leaks when clients disconnect."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from typing import Any, cast

import pytest

from fastserve.errors import InvalidRequestError, OverloadedError
from fastserve.text.fast_tokenizer import FastTokenizer
from fastserve.worker import prepare
from fastserve.worker.caller import Caller
from fastserve.worker.prompt_pool import INLINE_BYTES, LONG_BYTES, PromptPool
from tests.worker.conftest import MODEL, Running, RunWorker, until

MEDIUM = INLINE_BYTES + 1


async def test_a_full_queue_refuses_and_short_bodies_never_wait() -> None:
    pool, release = PromptPool(2, 3), threading.Event()
    held = [asyncio.create_task(pool.run(MEDIUM, release.wait)) for _ in range(5)]
    await asyncio.sleep(0)
    assert pool.pending == 5
    with pytest.raises(OverloadedError, match="--max-preparing") as caught:
        await pool.run(MEDIUM, release.wait)
    assert caught.value.headers().keys() == {"Retry-After"}
    assert await pool.run(INLINE_BYTES, lambda: "short") == "short"
    assert await pool.run(LONG_BYTES + 1, lambda: "in the other lane") == "in the other lane"
    release.set()
    assert await asyncio.gather(*held) == [True] * 5
    await until(lambda: pool.pending == 0)
    pool.close()


async def test_cancelled_calls_leave_the_queue_and_running_ones_count_until_their_thread_is_free() -> None:
    pool, release, ran = PromptPool(1, 10), threading.Event(), []
    running = asyncio.create_task(pool.run(MEDIUM, release.wait))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(pool.run(MEDIUM, lambda: ran.append(1))) for _ in range(5)]
    await asyncio.sleep(0)
    for task in (running, *waiting):
        task.cancel()
    await asyncio.gather(running, *waiting, return_exceptions=True)
    await until(lambda: pool.pending == 1)
    release.set()
    await until(lambda: pool.pending == 0)
    assert ran == []
    pool.close()


async def test_an_error_is_the_callers() -> None:
    pool = PromptPool(1, 1)

    def fail() -> None:
        raise KeyError("x")

    for num_bytes in (1, MEDIUM):
        with pytest.raises(KeyError):
            await pool.run(num_bytes, fail)
    pool.close()


class Rests:
    """Replaces the event that ends a rest; records the seconds instead of sleeping."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def wait(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def set(self) -> None:
        pass


@pytest.mark.parametrize("num_bytes", [MEDIUM, LONG_BYTES + 1])
async def test_a_thread_rests_after_refusals_and_only_then(num_bytes: int) -> None:
    pool, rests = PromptPool(1, 10, max_refused_prompt_percent=20), Rests()
    for lane in pool._lanes:
        lane._closed = cast(threading.Event, rests)
    busy_s: list[float] = []

    def work(error: Exception | None) -> str:
        began = time.thread_time()
        while time.thread_time() - began < 0.01:
            pass
        busy_s.append(time.thread_time() - began)
        if error is not None:
            raise error
        return "answered"

    assert await pool.run(num_bytes, lambda: work(None)) == "answered"
    with pytest.raises(KeyError):
        await pool.run(num_bytes, lambda: work(KeyError("our own mistake")))
    await until(lambda: pool.pending == 0)
    assert rests.seconds == []
    with pytest.raises(InvalidRequestError):
        await pool.run(num_bytes, lambda: work(InvalidRequestError("no")))
    await until(lambda: pool.pending == 0)
    [seconds] = rests.seconds
    assert 4 * busy_s[-1] <= seconds < 4 * busy_s[-1] + 0.05
    pool.close()


async def test_neither_the_result_nor_closing_waits_for_the_rest() -> None:
    pool = PromptPool(1, 10, max_refused_prompt_percent=0.001)

    def refuse() -> None:
        began = time.thread_time()
        while time.thread_time() - began < 0.001:
            pass
        raise InvalidRequestError("no")

    with pytest.raises(InvalidRequestError):
        await pool.run(MEDIUM, refuse)
    assert pool.pending == 1, "the thread rests"
    waiting = asyncio.create_task(pool.run(MEDIUM, lambda: "never"))
    await asyncio.sleep(0)
    pool.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: pool.pending == 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/worker_generate", "/count_token"])
async def test_prompts_that_are_far_too_long_are_never_tokenized(
    run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    text = "never tokenise me " * 20_000
    body: dict[str, Any] = {"model": MODEL, "prompt": text, "messages": [{"role": "user", "content": text}]}
    body.pop("prompt" if "chat" in path else "messages")
    async with run_worker(max_model_len=512) as running:
        monkeypatch.delattr(FastTokenizer, "encode")
        status, answer = await running.post(path, body)
        if path == "/count_token":
            assert status == 200
            assert answer["count"] > 512
        elif path == "/worker_generate":
            assert (status, answer["error_code"]) == (200, 40303)
        else:
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
            assert "maximum context length is 512 tokens" in answer["error"]["message"]
            assert "at least" in answer["error"]["message"]


async def _chat(running: Running, **changes: Any) -> tuple[int, dict[str, Any]]:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    return await running.post("/v1/chat/completions", chat | changes)


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("stop", "Ω" * 200_000, "--max-stop-chars"),
        ("stop", ["\u0000" * 20_000] * 16, "--max-stop-chars"),
        ("stop_token_ids", [123456] * 60_000, "--max-stop-token-ids"),
        ("logit_bias", {str(number): 1.0 for number in range(30_000)}, "--max-logit-bias"),
        ("seed", "9" * 300_000, None),
    ],
)
async def test_a_field_that_is_far_too_long_is_named_with_its_size_and_its_bound(
    run_worker: RunWorker, field: str, value: object, flag: str | None
) -> None:
    async with run_worker() as running:
        for path, given in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
            ("/v1/completions", {"prompt": "hello"}),
        ):
            status, answer = await running.post(path, {"model": MODEL, **given, field: value})
            message = answer["error"]["message"]
            assert (status, answer["error"]["param"]) == (400, field)
            assert re.search(r"It has \d+ bytes; give at most 196608", message), message
            assert (flag or ".") in message
            assert len(message) < 400
            assert message.isprintable()


async def test_each_number_has_its_option(run_worker: RunWorker) -> None:
    options = {
        "max_messages": 2, "max_content_parts": 3, "max_prompts": 2, "max_stop_chars": 5, "max_stop_token_ids": 2,
        "max_logit_bias": 2, "max_json_depth": 5, "max_json_containers": 40, "max_prompt_logprobs": 20,
    }  # fmt: skip
    message = {"role": "user", "content": "hi"}
    part = {"type": "text", "text": "x"}
    async with run_worker(**options) as running:
        for flag, changes, fits in (
            ("--max-messages", {"messages": [message] * 3}, {"messages": [message] * 2}),
            (
                "--max-content-parts",
                {"messages": [message | {"content": [part] * 2}] * 2},
                {"messages": [message | {"content": [part] * 3}]},
            ),
            ("--max-stop-chars", {"stop": "x" * 6}, {"stop": "x" * 5}),
            ("--max-stop-token-ids", {"stop_token_ids": [5, 6, 7]}, {"stop_token_ids": [5, 6]}),
            ("--max-logit-bias", {"logit_bias": {"5": 1, "6": 1, "7": 1}}, {"logit_bias": {"5": 1, "6": 1}}),
            ("nested deeper than 5 levels", {"unheard_of": [[[[[1]]]]]}, {"unheard_of": [[[1]]]}),
            ("--max-json-containers", {"unheard_of": "[" * 40}, {"unheard_of": "[" * 10}),
            ("--max-prompt-logprobs", {"prompt_logprobs": 20}, {"prompt_logprobs": 0}),
        ):
            status, answer = await _chat(running, **changes)
            assert (status, flag in answer["error"]["message"]) == (400, True), answer
            status, answer = await _chat(running, **fits)
            assert status == 200, answer
        for prompt in (["a"] * 3, [[5]] * 3):
            status, answer = await running.post("/v1/completions", {"model": MODEL, "prompt": prompt})
            assert (status, "--max-prompts" in answer["error"]["message"]) == (400, True), answer


async def test_a_priority_above_others_takes_the_right_to_it(
    run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_worker() as running:
        assert (await _chat(running, priority=-5))[0] == 200

        def unprivileged(request: Any) -> Caller:
            return Caller("id", None, 0.0, may_prioritise=False)

        monkeypatch.setattr(prepare, "caller_of", unprivileged)
        status, answer = await _chat(running, priority=-5)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (403, "permission_denied", "priority")
        assert (await _chat(running, priority=5))[0] == 200
        assert [request.priority for request in running.engine.requests] == [-5, 5]
