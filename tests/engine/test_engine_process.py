"""The engine in its own process, over ZeroMQ: answers, aborts, failures at start, death, restart, a killed parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from fastserve.engine.build import build_core
from fastserve.engine.client import EngineProcess
from fastserve.engine.contract import EngineInfo, EngineRequest, LoadProgress, RequestOutput, SamplingParams
from fastserve.engine.settings import EngineConfig
from fastserve.errors import EngineDeadError, InternalError, StartupError

from .conftest import TinyModels


def config(path: str, **settings: object) -> EngineConfig:
    values = {"model_dir": path, "device": "cpu", "max_total_tokens": 4096, **settings}
    return EngineConfig(**values)  # type: ignore[arg-type]


module_loop = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Started:
    engine: EngineProcess
    info: EngineInfo
    progress: list[LoadProgress]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(tiny_models: TinyModels) -> AsyncIterator[Started]:
    process = EngineProcess(config(tiny_models.path("llama")))
    progress: list[LoadProgress] = []
    info = await process.start(progress.append)
    yield Started(process, info, progress)
    await process.close()


@pytest.fixture(scope="module")
def engine(started: Started) -> EngineProcess:
    return started.engine


async def answer(engine: EngineProcess, request: EngineRequest) -> RequestOutput:
    whole = RequestOutput(request.request_id, [])
    with engine.generate(request) as outputs:
        async for output in outputs:
            whole.token_ids += output.token_ids
            whole.finish_reason = output.finish_reason
            whole.logprobs = (whole.logprobs or []) + (output.logprobs or [])
    return whole


def weights_bytes(path: str) -> int:
    return os.path.getsize(Path(path) / "model.safetensors")


async def eventually(condition: object, timeout_s: float = 10.0) -> float:
    """Wait until the condition holds; the seconds it took."""
    assert callable(condition)
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout_s:
            raise AssertionError("the condition did not come true in time")
        await asyncio.sleep(0.005)
    return time.monotonic() - begin


@module_loop
async def test_many_at_once_get_their_own_answers(engine: EngineProcess, tiny_models: TinyModels) -> None:
    before = engine.stats.generated_tokens
    prompts = [[2 + index, 40, 50 + index] for index in range(20)]
    params = SamplingParams(15, temperature=0.0, stop_token_ids=(1,), logprobs=2)
    answers = await asyncio.gather(
        *(answer(engine, EngineRequest(f"r{index}", prompt, params)) for index, prompt in enumerate(prompts))
    )
    path = tiny_models.path("llama")
    for prompt, found in zip(prompts, answers, strict=True):
        assert found.token_ids == tiny_models.reference(path, prompt, 15, [1])
        assert found.logprobs is not None
        for token_id, output in zip(found.token_ids, found.logprobs, strict=True):
            assert output.token_id == token_id == output.top[0][0]
            assert output.logprob == output.top[0][1] >= output.top[1][1]
    assert engine.stats.generated_tokens - before == sum(len(found.token_ids) for found in answers)
    assert engine.stats.tokens_per_s > 0


@module_loop
async def test_leaving_early_stops_the_generation_at_once(engine: EngineProcess) -> None:
    aborted, before = engine.stats.aborted, engine.stats.generated_tokens
    endless = EngineRequest("r", [2, 3, 4], SamplingParams(240, temperature=0.0))
    with engine.generate(endless) as outputs:
        async for _ in outputs:
            break
    await eventually(lambda: engine.stats.aborted == aborted + 1)
    assert engine.stats.num_running == 0
    assert engine.stats.num_used_blocks == 0
    generated = engine.stats.generated_tokens
    assert generated - before < 240
    await asyncio.sleep(0.1)
    assert engine.stats.generated_tokens == generated


@module_loop
async def test_a_refused_request_raises_and_others_go_on(engine: EngineProcess) -> None:
    with pytest.raises(InternalError, match="no tokens"):
        await answer(engine, EngineRequest("empty", [], SamplingParams(3)))
    found = await answer(engine, EngineRequest("good", [2, 3], SamplingParams(3, temperature=0.0)))
    assert len(found.token_ids) == 3


@module_loop
async def test_death_fails_the_running_and_a_restart_serves_again(engine: EngineProcess) -> None:
    async def endless() -> None:
        await answer(engine, EngineRequest("endless", [2, 3], SamplingParams(200, temperature=0.0)))
        raise AssertionError("the answer should not have come to its end")

    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)  # so that it cannot finish before it is killed
    running = asyncio.create_task(endless())
    await asyncio.sleep(0.05)
    os.kill(engine.pid, signal.SIGKILL)
    reason = await asyncio.wait_for(engine.wait_dead(), 10)
    assert "SIGKILL" in reason
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        await running
    with pytest.raises(EngineDeadError):
        await answer(engine, EngineRequest("late", [2], SamplingParams(1)))
    info = await engine.start(lambda _: None)
    assert info.architecture == "LlamaForCausalLM"
    found = await answer(engine, EngineRequest("again", [2, 3], SamplingParams(3, temperature=0.0)))
    assert len(found.token_ids) == 3


@module_loop
async def test_progress_counts_the_bytes_of_the_weights(started: Started, tiny_models: TinyModels) -> None:
    size = weights_bytes(tiny_models.path("llama"))
    seen, info = started.progress, started.info
    assert seen[0].done == 0
    assert seen[-1].done == seen[-1].total
    assert 0 < seen[-1].total <= size
    assert info.num_blocks * info.block_size == 4096
    assert info.max_model_len == 256


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cuda"}, "--device cuda"),
        ({"max_model_len": 9999}, "--max-model-len 9999"),
        ({"max_total_tokens": 16}, "--max-total-tokens"),
        ({"max_total_tokens": 64, "max_model_len": 200}, "does not fit"),
        ({"gpu_memory_utilization": 1.5, "max_total_tokens": None}, "--gpu-memory-utilization"),
    ],
)
def test_a_failed_start_says_why(tiny_models: TinyModels, settings: dict[str, object], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        build_core(config(**{"path": tiny_models.path("llama"), **settings}), lambda *_: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kept_bytes", "words"), [(2000, "its header is broken or cut off"), (20000, "is cut off in the tensor lm_head")]
)
def test_truncated_weights_fail_the_start(tiny_models: TinyModels, tmp_path: Path, kept_bytes: int, words: str) -> None:
    source = Path(tiny_models.path("llama"))
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept_bytes])
    with pytest.raises(StartupError, match=rf"model\.safetensors .*{words}"):
        build_core(config(str(tmp_path)), lambda *_: None)


def test_a_killed_worker_takes_its_engine_along(tiny_models: TinyModels) -> None:
    script = (
        "import asyncio, sys\n"
        "from fastserve.engine.client import EngineProcess\n"
        "from fastserve.engine.settings import EngineConfig\n"
        "async def main():\n"
        "    engine = EngineProcess(EngineConfig(model_dir=sys.argv[1], device='cpu', max_total_tokens=4096))\n"
        "    await engine.start(lambda _: None)\n"
        "    print(engine.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, tiny_models.path("llama")], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        engine_pid = int(parent.stdout.readline())
        parent.kill()
    engine = psutil.Process(engine_pid) if psutil.pid_exists(engine_pid) else None
    if engine is not None:
        engine.wait(timeout=5)
    assert not psutil.pid_exists(engine_pid)
