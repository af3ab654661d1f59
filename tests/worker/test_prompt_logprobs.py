"""Log probabilities of the prompt: OpenAI's `echo` with `logprobs`, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.engine.contract import SamplingParams, TokenLogprob
from fastserve.engine.fake import Script
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.jobs import Prompt
from fastserve.worker.prompts import Echo
from tests.worker.conftest import MODEL, RunWorker

Say = Callable[[str], Script]
PROMPT = "naïve 世界: 7 + 5 is"
ANSWER = " 12 世"


async def test_echo_with_logprobs_covers_prompt_and_answer(
    run_worker: RunWorker, say: Say, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(PROMPT, add_special_tokens=True)
    async with run_worker(say(ANSWER)) as running:
        arguments: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 20}
        choice = (await running.openai.completions.create(**arguments)).choices[0]
        assert choice.text == PROMPT + ANSWER
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.text_offset is not None
        size = running.runtime.info.vocab_size
        assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None, "nothing comes before the first token"
        assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx([-0.5 - token_id / size for token_id in ids[1:]])
        assert all(len(top) in (1, 2) for top in logprobs.top_logprobs[1:])
        assert (
            len(logprobs.tokens)
            == len(logprobs.token_logprobs)
            == len(logprobs.top_logprobs)
            == len(logprobs.text_offset)
        )
        answer_at = len(ids)
        assert logprobs.text_offset[answer_at] == len(PROMPT)
        for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
            if not token.startswith("bytes:"):
                assert (choice.text + "<|im_end|>").startswith(token, offset)
        plain = (await running.openai.completions.create(**arguments | {"echo": False})).choices[0]
        assert plain.logprobs is not None
        assert plain.logprobs.tokens == logprobs.tokens[answer_at:]
        assert running.engine.requests[-1].params.prompt_logprobs is None


async def test_the_streamed_echo_equals_the_whole_one(run_worker: RunWorker, say: Say) -> None:
    async with run_worker(say(ANSWER)) as running:
        arguments: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "x"], "n": 2, "echo": True, "logprobs": 1}
        whole = (await running.openai.completions.create(**arguments)).choices
        texts = [""] * 4
        tokens: list[list[tuple[str, float, int]]] = [[], [], [], []]
        async for chunk in await running.openai.completions.create(stream=True, **arguments):
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            if (logprobs := choice.logprobs) is not None:
                parts = zip(
                    logprobs.tokens or [], logprobs.token_logprobs or [], logprobs.text_offset or [], strict=True
                )
                tokens[choice.index] += parts
        assert texts == [choice.text for choice in whole] == [PROMPT + ANSWER] * 2 + ["x" + ANSWER] * 2
        for choice, streamed in zip(whole, tokens, strict=True):
            logprobs = choice.logprobs
            assert logprobs is not None
            assert streamed == list(
                zip(logprobs.tokens or [], logprobs.token_logprobs or [], logprobs.text_offset or [], strict=True)
            )


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_scoring_as_evaluation_harnesses_request_it(
    run_worker: RunWorker, say: Say, tokenizer: Tokenizer, max_tokens: int, stream: bool
) -> None:
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in (PROMPT, "one two three", "x")]
    async with run_worker(say(ANSWER)) as running:
        answer: Any = await running.openai.completions.create(
            model=MODEL, prompt=prompts, echo=True, max_tokens=max_tokens, logprobs=1, stream=stream, temperature=0
        )
        choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
        for ids in prompts:
            (choice,) = (one for one in choices if one.index == prompts.index(ids))
            assert choice.finish_reason == "length"
            assert choice.text.startswith(tokenizer.decode(ids))
            assert (choice.text == tokenizer.decode(ids)) is (max_tokens == 0)
            assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(ids) + max_tokens
            for token, top in zip(choice.logprobs.tokens[1:], choice.logprobs.top_logprobs[1:], strict=True):
                assert max(top, key=top.get) == token, "the fake engine finds each token the likeliest"
        if not stream:
            assert answer.usage.completion_tokens == max_tokens * len(prompts)
        assert {request.params.max_tokens for request in running.engine.requests} == {1}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_token_that_ends_an_answer_has_its_entry(
    run_worker: RunWorker, say: Say, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    (eos,) = tokenizer.eos_token_ids
    async with run_worker(say("")) as running:  # the first sampled token is the EOS token
        arguments: dict[str, Any] = {"model": MODEL, "prompt": ids, "max_tokens": 1, "logprobs": 1, "stream": stream}
        for echo in (True, False):
            answer: Any = await running.openai.completions.create(echo=echo, **arguments)
            (choice,) = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
            assert choice.finish_reason == "stop"
            assert choice.text == (PROMPT if echo else "")
            assert choice.logprobs.tokens[-1] == tokenizer.token_bytes(eos).decode()
            assert choice.logprobs.text_offset[-1] == len(choice.text)
            assert len(choice.logprobs.token_logprobs) == len(ids) * echo + 1


async def test_echo_of_text_with_special_tokens(run_worker: RunWorker, say: Say, tokenizer: Tokenizer) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n"
    async with run_worker(say(ANSWER)) as running:
        create = running.openai.completions.create
        choice = (await create(model=MODEL, prompt=prompt, echo=True, logprobs=0, max_tokens=0)).choices[0]
        assert choice.logprobs is not None
        assert choice.text == prompt == "".join(choice.logprobs.tokens or [])
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert choice.logprobs.text_offset == [
            len("".join((choice.logprobs.tokens or [])[:at])) for at in range(len(ids))
        ]
        # The same prompt, sent as ids.
        by_ids = (await create(model=MODEL, prompt=ids, echo=True, logprobs=0, max_tokens=0)).choices[0]
        assert (by_ids.text, by_ids.logprobs) == (choice.text, choice.logprobs)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_echoed_token_ids_agree_with_their_offsets_and_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=30))
    ids += data.draw(st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=3))
    ids = data.draw(st.permutations(ids))
    echo = Echo(tokenizer, Prompt(None, ids, SamplingParams(max_tokens=1)), 0)
    tokens = echo.tokens([TokenLogprob(token_id, -1.0, []) for token_id in ids[1:]])
    assert len(tokens) == len(ids)
    ends = [token.text_offset for token in tokens[1:]] + [len(echo.text)]
    assert [token.text_offset for token in tokens] == sorted(token.text_offset for token in tokens)
    for token, end in zip(tokens, ends, strict=True):
        if not token.text.startswith("bytes:"):
            assert echo.text.startswith(token.text, token.text_offset)
            assert end >= token.text_offset + len(token.text)
    for token_id, token in zip(ids, tokens, strict=True):
        if token_id in tokenizer.special_ids:
            assert echo.text.startswith(token.text, token.text_offset), "special tokens are not dropped"


async def test_prompt_logprobs_in_vllms_format(run_worker: RunWorker, say: Say, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three", add_special_tokens=True)
    async with run_worker(say(ANSWER)) as running:
        for num_top, max_tokens in ((0, 5), (2, 0)):
            answer = await running.openai.completions.create(
                model=MODEL, prompt="one two three", max_tokens=max_tokens, extra_body={"prompt_logprobs": num_top}
            )
            choice = answer.choices[0]
            assert choice.logprobs is None
            assert bool(choice.text) is bool(max_tokens), "the prompt is not echoed"
            logprobs: Any = (choice.model_extra or {})["prompt_logprobs"]
            assert len(logprobs) == len(ids)
            assert logprobs[0] is None
            for token_id, entry in zip(ids[1:], logprobs[1:], strict=True):
                own = entry[str(token_id)]
                assert next(iter(entry)) == str(token_id)
                assert own["logprob"] == pytest.approx(-0.5 - token_id / running.runtime.info.vocab_size)
                assert own["decoded_token"] == tokenizer.token_bytes(token_id).decode()
                assert own["rank"] == (1 if num_top else None)
                assert len(entry) == max(1, num_top)
        chat = await running.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], extra_body={"prompt_logprobs": 1}
        )
        beside: Any = (chat.model_extra or {})["prompt_logprobs"]
        assert len(beside) == len(running.engine.requests[-1].prompt_ids)
        without = await running.openai.completions.create(model=MODEL, prompt="x")
        assert "prompt_logprobs" not in (without.choices[0].model_extra or {})


async def test_echo_and_prompt_logprobs_each_get_the_requested_number(run_worker: RunWorker) -> None:
    async with run_worker() as running:
        answer = await running.openai.completions.create(
            model=MODEL, prompt="one two", echo=True, logprobs=1, max_tokens=0, extra_body={"prompt_logprobs": 3}
        )
        choice = answer.choices[0]
        assert running.engine.requests[0].params.prompt_logprobs == 3
        assert choice.logprobs is not None
        assert [len(top or ()) for top in choice.logprobs.top_logprobs or []][:2] == [0, 1]
        assert [len(entry or ()) for entry in (choice.model_extra or {})["prompt_logprobs"]][:2] == [0, 3]
