"""How soon ranks notice in a step that another one does not answer, though it lives."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from fastserve.engine.client import EngineProcess
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.ranks import step_deadline
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.gang_hub import MAX_LEAVE_S
from fastserve.engine.ranks.processes import MAX_STEP_SILENCE_S
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
from fastserve.engine.ranks.step_deadline import MIN_STEP_SILENCE_S, StepDeadline
from fastserve.engine.settings import EngineConfig
from fastserve.errors import EngineDeadError

from .conftest import TinyModels
from .test_ranks_collectives import share_memory


class NotingCollectives:
    rank = 0
    size = 2

    def __init__(self) -> None:
        self.timeout_s = 0.0

    def set_timeout(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s


def test_the_wait_follows_the_longest_step() -> None:
    collectives, now = NotingCollectives(), [0.0]
    deadline = StepDeadline(collectives, lambda: now[0])  # type: ignore[arg-type]
    waits = []
    for step_s in (0.01, 0.02, 2.0, 0.01, 30.0, 0.01):
        with deadline.step():
            waits.append(collectives.timeout_s)
            now[0] += step_s
        assert collectives.timeout_s == MAX_STEP_SILENCE_S  # between steps
    expected = [MAX_STEP_SILENCE_S, MIN_STEP_SILENCE_S, MIN_STEP_SILENCE_S, 20.0, 20.0, MAX_STEP_SILENCE_S]
    assert waits == pytest.approx(expected)


def test_a_rank_that_does_not_answer_in_a_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sleeps in its third step, as long as the others wait."""
    monkeypatch.setattr(step_deadline, "MIN_STEP_SILENCE_S", 0.5)
    noticed: list[float] = []

    def run_rank(collectives: SharedMemoryCollectives) -> None:
        deadline = StepDeadline(collectives)
        for index in range(3):
            with deadline.step():
                if index == 2 and collectives.rank == 1:
                    while not noticed:
                        time.sleep(0.01)
                    return
                begin = time.monotonic()
                try:
                    collectives.all_reduce(torch.ones(4))
                except RankLostError:
                    noticed.append(time.monotonic() - begin)
                    raise

    ranks = share_memory(2, timeout_s=20.0)
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(run_rank, collectives) for collectives in ranks)
        with pytest.raises(RankLostError, match=r"did not answer within 0\.5 s"):
            first.result()
        second.result()
    assert 0.5 <= noticed[0] < 10


def test_a_rank_that_compiles_kernels_in_a_step_is_no_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its third step needs a kernel that the other rank has in its cache."""
    monkeypatch.setattr(step_deadline, "MIN_STEP_SILENCE_S", 0.2)

    def run_rank(collectives: SharedMemoryCollectives) -> list[float]:
        deadline = StepDeadline(collectives, may_compile=True)
        found = []
        for index in range(4):
            with deadline.step():
                if index == 2 and collectives.rank == 1:
                    time.sleep(0.6)
                found.append(float(collectives.all_reduce(torch.ones(1))))
        return found

    ranks = share_memory(2, timeout_s=20.0)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run_rank, ranks)) == [[2.0] * 4] * 2


def test_time_in_which_a_process_was_stopped_is_no_silence_of_others() -> None:
    """Two processes that are frozen together, as those of a container are, go on."""
    first, second = share_memory(2, timeout_s=1.0)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            found = first.all_reduce(torch.ones(3))
            code = 0 if found.tolist() == [3.0] * 3 else 2
        finally:
            os._exit(code)
    try:
        process = psutil.Process(pid)
        deadline = time.monotonic() + 10
        while process.status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)  # longer than the wait
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
        assert second.all_reduce(torch.full((3,), 2.0)).tolist() == [3.0] * 3
    finally:
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


HANG = """
import collections, itertools, os, threading, time

def watch(path):
    while True:
        time.sleep(0.02)
        try:
            with open(path) as file:
                if file.read() == str(os.getpid()):
                    collections.deque(itertools.repeat(0), maxlen=0)  # for ever, and keeps all other threads waiting
        except OSError:
            pass

threading.Thread(target=watch, args=(os.environ["PID_THAT_HANGS"],), daemon=True).start()
"""


@pytest.mark.slow
def test_a_rank_that_computes_without_end_is_noticed(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANG)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PID_THAT_HANGS", str(tmp_path / "pid"))

    async def run() -> None:
        config = EngineConfig(model_dir=tiny_models.path("llama"), device="cpu", max_total_tokens=320, tp_size=2)
        engine = EngineProcess(config)
        await engine.start(lambda event: None)
        assert engine.pid is not None
        [rank] = map(psutil.Process, engine.rank_pids)
        begin = 0.0

        async def generate() -> None:
            nonlocal begin
            for index in range(1000):
                request = EngineRequest(str(index), [3, 4], SamplingParams(200, temperature=0.0))
                with engine.generate(request) as outputs:
                    async for _ in outputs:
                        if not begin:
                            begin = time.monotonic()
                            (tmp_path / "new").write_text(str(rank.pid))
                            (tmp_path / "new").rename(tmp_path / "pid")

        with pytest.raises(EngineDeadError):
            await generate()
        assert MIN_STEP_SILENCE_S <= time.monotonic() - begin < MIN_STEP_SILENCE_S + 5
        await asyncio.wait_for(engine.wait_dead(), 5)
        await asyncio.to_thread(rank.wait, MAX_LEAVE_S + 10)
        await engine.start(lambda event: None)
        await engine.close()

    asyncio.run(run())
