"""best_of: more choices are generated than returned, and the most likely are returned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.engine.fake import Script
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import MODEL, RunWorker


def by_choice(answers: Sequence[Sequence[int]]) -> Script:
    def script(request: EngineRequest, info: EngineInfo) -> Sequence[int]:
        return answers[request.choice % len(answers)]

    return script


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> list[int]:
    """Ascending ids of three words. The fake engine gives larger ids lower logprobs."""
    ids = [at for at in range(tokenizer.vocab_size) if re.fullmatch(rb"[a-z]{3,}", tokenizer.token_bytes(at))]
    return [ids[0], ids[len(ids) // 2], ids[-1]]


async def test_the_choices_with_the_highest_mean_logprob_are_returned_best_first(
    run_worker: RunWorker, words: list[int], tokenizer: Tokenizer
) -> None:
    low, middle, high = words
    # The longest answer has the lowest sum but not the lowest mean.
    answers = [[high] * 3, [low] * 9, [middle] * 5, [high] * 4]
    async with run_worker(by_choice(answers)) as running:
        create = running.openai.completions.create
        answer = await create(model=MODEL, prompt="x", n=2, best_of=4, max_tokens=50)
        assert [choice.text for choice in answer.choices] == [
            tokenizer.decode(answers[1]),
            tokenizer.decode(answers[2]),
        ]
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert all(choice.logprobs is None for choice in answer.choices), "nobody asked for them"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == sum(len(ids) + 1 for ids in answers), "all that was generated"
        assert answer.usage.prompt_tokens == len(running.engine.requests[0].prompt_ids)
        assert [request.choice for request in running.engine.requests] == [0, 1, 2, 3]
        asked = await create(model=MODEL, prompt=["x", "y"], best_of=3, max_tokens=50, logprobs=1)
        assert [choice.text for choice in asked.choices] == [tokenizer.decode(answers[1])] * 2
        assert asked.choices[1].logprobs is not None
        assert len(asked.choices[1].logprobs.tokens or []) == 9 + 1, "with the end token"
        chat: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        best = await running.openai.chat.completions.create(**chat, extra_body={"best_of": 4})
        assert best.choices[0].message.content == tokenizer.decode(answers[1])
        assert best.choices[0].logprobs is None


async def test_tokens_cut_off_by_a_stop_string_do_not_count(
    run_worker: RunWorker, words: list[int], tokenizer: Tokenizer
) -> None:
    low, middle, high = words
    answers = [[middle] * 6, [low, low, low, high, high, high, high, high]]
    async with run_worker(by_choice(answers)) as running:
        arguments: dict[str, Any] = {"model": MODEL, "prompt": "x", "best_of": 2, "max_tokens": 50}
        whole = await running.openai.completions.create(**arguments)
        cut = await running.openai.completions.create(stop=tokenizer.decode([low, low, high]), **arguments)
        assert whole.choices[0].text == tokenizer.decode(answers[0])
        assert cut.choices[0].text == tokenizer.decode([low])


async def test_best_of_equal_to_n_is_n(run_worker: RunWorker, words: list[int], tokenizer: Tokenizer) -> None:
    answers = [[words[-1]], [words[0]]]
    async with run_worker(by_choice(answers)) as running:
        create = running.openai.completions.create
        arguments: dict[str, Any] = {"model": MODEL, "prompt": "x", "n": 2, "best_of": 2}
        texts = [choice.text for choice in (await create(**arguments)).choices]
        assert texts == [tokenizer.decode(ids) for ids in answers], "in their own order"
        assert running.engine.requests[0].params.logprobs is None
        streamed = ["", ""]
        async for chunk in await create(stream=True, **arguments):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts
