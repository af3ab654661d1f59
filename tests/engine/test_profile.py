"""`--profile-steps`, and the profiler behind the call: traces of steps; and what an engine counts about each step."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from fastserve.demo import demo_model_path
from fastserve.engine.build import build_core
from fastserve.engine.client import EngineProcess
from fastserve.engine.contract import STEP_SECONDS_BOUNDS, STEP_SIZE_BOUNDS, EngineRequest, Histogram, SamplingParams
from fastserve.engine.profiling import StepProfiler
from fastserve.engine.settings import EngineConfig
from fastserve.errors import ConflictError, InternalError
from tests.trio.processes import Service


async def generate(engine: EngineProcess, request_id: str, num_tokens: int) -> int:
    params = SamplingParams(num_tokens, temperature=0.0)
    count = 0
    with engine.generate(EngineRequest(request_id, [5, 6, 7], params)) as outputs:
        async for output in outputs:
            count += len(output.token_ids)
    return count


def read_trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def config(folder: Path, num_steps: int) -> EngineConfig:
    return EngineConfig(
        model_dir=demo_model_path(),
        device="cpu",
        max_total_tokens=4096,
        profile_steps=num_steps,
        profile_dir=str(folder),
    )


def test_a_worker_writes_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "not there yet"
    flags = ["--no-register", "--max-total-tokens", "4096", "--profile-steps", "5", "--profile-dir", str(folder)]
    worker = Service("worker", "model_worker", flags, tmp_path)
    worker.start()
    try:
        worker.wait_serving("/ready")
        with openai.OpenAI(base_url=worker.address + "/v1", api_key="none", max_retries=0) as client:
            answer = client.completions.create(
                model="fastserve-demo", prompt="Once", max_tokens=200, temperature=1.0, extra_body={"ignore_eos": True}
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 200, "the engine goes on after the trace"
        [path] = folder.iterdir()
        assert f"the trace is in {path}" in worker.log
    finally:
        worker.stop()
    events = [event for event in read_trace(path) if event.get("ph") == "X"]
    steps = sorted({event["name"] for event in events if event["name"].startswith("ProfilerStep#")})
    assert len(steps) == 5
    assert "ProfilerStep#0" not in steps, "the first steps are no measure"
    assert any(event["name"].startswith("aten::") for event in events)


@pytest.mark.slow
async def test_an_engine_that_ends_early_writes_what_it_has(tmp_path: Path) -> None:
    engine = EngineProcess(config(tmp_path, 1000))
    await engine.start(lambda _: None)
    assert await generate(engine, "r", 30) == 30
    assert os.listdir(tmp_path) == []
    await engine.close()
    [name] = os.listdir(tmp_path)
    path = tmp_path / name
    names = {event["name"] for event in read_trace(path) if "name" in event}
    assert any(name.startswith("ProfilerStep#") for name in names)


def steps_of(path: str) -> set[str]:
    return {event["name"] for event in read_trace(Path(path)) if event.get("name", "").startswith("ProfilerStep#")}


def test_steps_are_recorded_again_and_again(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "new")
    with pytest.raises(ConflictError, match="no profile was started"):
        profiler.stop()
    paths = []
    for num_steps, num_done in ((2, 9), (5, 3)):
        paths.append(profiler.start(num_steps, 1))
        with pytest.raises(ConflictError, match="already"):
            profiler.start(1, 1)
        for _ in range(num_done):
            torch.ones(3).add(1)
            profiler.step_done()
        assert profiler.stop() == profiler.stop() == paths[-1]
    assert len(steps_of(paths[0])) == 2, "as many as asked for"
    assert len(steps_of(paths[1])) in (2, 3), "stopped before as many had run"
    assert sorted(map(str, (tmp_path / "new").iterdir())) == sorted(paths)


def test_a_profile_without_steps_or_a_place_to_write_says_so(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path)
    profiler.start(5, 3)
    profiler.step_done()
    with pytest.raises(ConflictError, match="no step was recorded"):
        profiler.stop()
    (tmp_path / "file").touch()
    with pytest.raises(InternalError, match="cannot be written to --profile-dir"):
        StepProfiler(tmp_path / "file" / "folder").start(5, 3)


def test_the_time_of_writing_is_announced(tmp_path: Path) -> None:
    announced: list[float] = []
    profiler = StepProfiler(tmp_path, announced.append)
    profiler.start(1, 1)
    begun = len(announced)
    assert begun > 0
    profiler.step_done()
    profiler.step_done()
    assert len(announced) > begun
    assert min(announced) > 60


def test_what_steps_took_is_counted() -> None:
    core = build_core(EngineConfig(model_dir=demo_model_path(), device="cpu", max_total_tokens=4096), lambda *_: None)
    assert core.stats.step_tokens == Histogram()
    for index in range(3):
        core.add(EngineRequest(f"r{index}", list(range(5, 15)), SamplingParams(4, temperature=0.0)))
    before = core.stats
    while core.has_work:
        core.step()
    stats = core.stats
    assert before.step_tokens == Histogram(), "a snapshot does not change"
    for histogram, bounds in (
        (stats.step_seconds, STEP_SECONDS_BOUNDS),
        (stats.step_tokens, STEP_SIZE_BOUNDS),
        (stats.step_sequences, STEP_SIZE_BOUNDS),
    ):
        assert sum(histogram.counts) == stats.steps
        assert len(histogram.counts) == len(bounds) + 1
    # Without drafts: the three prompts in one step, and then three steps of a token each.
    assert stats.draft_tokens == 0
    assert stats.step_tokens.total == 30 + 3 * 3
    assert stats.step_sequences.total == 3 * 4
    assert stats.step_seconds.total >= stats.step_s > 0


@pytest.mark.parametrize(("value", "at"), [(0.5, 0), (1.0, 0), (1.5, 1), (4.0, 2), (5.0, 3)])
def test_a_bound_belongs_to_what_is_below_it(value: float, at: int) -> None:
    histogram = Histogram()
    histogram.add(value, (1.0, 2.0, 4.0))
    assert [index for index, count in enumerate(histogram.counts) if count] == [at]
    assert histogram.total == value
