"""Token ids that the model does not have are refused by name, and none of them reaches the engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from fastserve.engine.fake import FakeOptions
from fastserve.text.model_files import configured_eos_ids
from tests.worker.conftest import MODEL, Running, RunWorker

pytestmark = pytest.mark.asyncio(loop_scope="module")

VOCAB_SIZE = 300
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
TEXT: dict[str, Any] = {"prompt": [5]}
ROUTES = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
NO_TOKENS: list[Any] = [
    *(-1, -VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE + 1, 2**31 - 1, 2**31, 2**32 + 5, 2**63, 2**64, 10**40, -(2**63) - 1),
    *(True, False, 1.5, 5.0, "5", None, [5], {"5": 1}, ""),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(run_worker: RunWorker) -> AsyncIterator[Running]:
    def shrink(options: FakeOptions) -> None:
        options.vocab_size = VOCAB_SIZE

    async with run_worker(prepare=shrink) as running:
        yield running


async def refused(shared: Running, path: str, body: dict[str, Any], param: str, value: Any) -> None:
    before = len(shared.engine.requests)
    status, answer = await shared.post(path, {"model": MODEL, "max_tokens": 1, **body})
    assert status == 400, (path, value, answer)
    error = answer["error"]
    assert error["param"].split(".")[0] == param, (path, value, answer)
    assert f"'{param}" in error["message"]
    assert len(error["message"]) < 400
    assert len(shared.engine.requests) == before


@pytest.mark.parametrize("value", NO_TOKENS, ids=repr)
async def test_token_ids_that_the_model_does_not_have_are_refused(shared: Running, value: Any) -> None:
    for path, body in ROUTES:
        for ids in ([value], [5, value], [value, 5]):
            await refused(shared, path, {**body, "stop_token_ids": ids}, "stop_token_ids", value)
        if isinstance(value, int) and not isinstance(value, bool):
            for bias in (5, -100):
                await refused(shared, path, {**body, "logit_bias": {str(value): bias}}, "logit_bias", value)
    is_text = isinstance(value, str)
    for prompt in ([value], [5, value], [[5], [5, value]], [[value], [5]]):
        if (is_text or isinstance(value, list)) and prompt == [value]:
            continue  # a list of texts, or of prompts
        await refused(shared, "/v1/completions", {"prompt": prompt}, "prompt", value)


@pytest.mark.parametrize("name", ["5.0", "1e1", " 5", "+5", "0x5", "\u0665", "five", "", "5_0", "-0.0"])
async def test_names_in_logit_bias_are_token_ids(shared: Running, name: str) -> None:
    for path, body in ROUTES:
        await refused(shared, path, {**body, "logit_bias": {name: 1}}, "logit_bias", name)


@pytest.mark.parametrize("bias", [101, -100.5, True, None, "1", [1], 10**40])
async def test_values_in_logit_bias_are_numbers_in_its_range(shared: Running, bias: Any) -> None:
    for path, body in ROUTES:
        await refused(shared, path, {**body, "logit_bias": {"5": bias}}, "logit_bias", bias)


@pytest.mark.parametrize("field", ["allowed_token_ids", "bad_words"])
async def test_allowed_tokens_are_ids_of_the_model_and_bad_words_are_texts(shared: Running, field: str) -> None:
    for path, body in ROUTES:
        wrong = [[VOCAB_SIZE], [-1], [[5]], [5.0], [True], True, 5, {}]
        for value in [*wrong, ["a"] if field == "allowed_token_ids" else [5]]:
            await refused(shared, path, {**body, field: value}, field, value)


async def test_the_last_token_of_the_vocabulary_is_one(shared: Running) -> None:
    last = VOCAB_SIZE - 1
    for path, body in [*ROUTES, ("/v1/completions", {"prompt": [0, last]})]:
        fields = {**body, "stop_token_ids": [0, last], "logit_bias": {"0": 1, str(last): -100}}
        status, answer = await shared.post(path, {"model": MODEL, "max_tokens": 1, **fields})
        assert status == 200, answer
        assert set(shared.engine.requests[-1].params.stop_token_ids) >= {0, last}


async def test_fastchats_clients_may_send_the_ids_of_another_model(shared: Running) -> None:
    body = {"prompt": "a", "stop_token_ids": [5, -1, VOCAB_SIZE, 10**9], "max_new_tokens": 1}
    status, record = await shared.post("/worker_generate", body)
    assert (status, record["error_code"]) == (200, 0)
    ids = shared.engine.requests[-1].params.stop_token_ids
    assert 5 in ids
    assert all(0 <= token_id < VOCAB_SIZE for token_id in ids)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, (5,)), ([5, 7], (5, 7)), (-1, ()), (True, ()), ([5, -1, True, None, "7", 7.0], (5,)), ("5", ()), ({}, ())],
)
async def test_end_tokens_of_a_configuration_are_token_ids(
    tmp_path: Path, value: Any, expected: tuple[int, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert configured_eos_ids(tmp_path) == expected
