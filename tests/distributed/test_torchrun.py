"""Workers that torchrun starts: its variables, and groups of processes with one that serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
import psutil
import pytest

from fastserve.demo import demo_model_path
from fastserve.distributed.problems import EnvironmentFault
from fastserve.distributed.torchrun import TorchrunProcess, drop_default_threads, read_torchrun
from tests.processes import free_ports

TIMEOUT_S = 60.0


def variables(rank: int, size: int, **changes: str) -> dict[str, str]:
    found = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return {**found, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **changes}


def test_a_process_of_torchrun_knows_its_rank() -> None:
    assert read_torchrun(variables(1, 2), 1) == TorchrunProcess(1, 2)
    assert read_torchrun(variables(0, 4), 4) == TorchrunProcess(0, 4)


def test_variables_of_others_do_not_divide_a_model() -> None:
    assert read_torchrun({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, 1) is None


@pytest.mark.parametrize(
    ("changes", "tp_size", "named"),
    [
        ({}, 3, ["--tp-size 3", "WORLD_SIZE=2", "--nproc-per-node 3"]),
        ({"LOCAL_RANK": "2", "RANK": "2"}, 1, ["LOCAL_RANK=2", "WORLD_SIZE=2"]),
        ({"LOCAL_RANK": "one"}, 1, ["LOCAL_RANK=one", "whole number"]),
        ({"RANK": "-1"}, 1, ["RANK=-1", "from 0"]),
        ({"RANK": "0"}, 1, ["RANK=0", "LOCAL_RANK=1"]),
        ({"WORLD_SIZE": "4"}, 1, ["LOCAL_WORLD_SIZE=2", "WORLD_SIZE=4", "--nnodes 1"]),
        ({"LOCAL_WORLD_SIZE": "3"}, 1, ["LOCAL_WORLD_SIZE=3", "WORLD_SIZE=2"]),
        ({"WORLD_SIZE": "100000"}, 1, ["WORLD_SIZE=100000", "from 1 to 64"]),
        ({"WORLD_SIZE": ""}, 1, ["WORLD_SIZE is not"]),
        ({"RANK": ""}, 1, ["RANK is not"]),
        ({"MASTER_PORT": "99999"}, 1, ["MASTER_PORT=99999", "from 1 to 65535"]),
    ],
)
def test_a_contradiction_is_refused_with_names_and_remedy(
    changes: dict[str, str], tp_size: int, named: list[str]
) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        read_torchrun(variables(1, 2, **changes), tp_size)
    assert all(name in str(caught.value) for name in named), str(caught.value)


def test_all_contradictions_are_reported_together() -> None:
    with pytest.raises(EnvironmentFault) as caught:
        read_torchrun(variables(0, 2, RANK="x", MASTER_PORT="0"), 3)
    assert str(caught.value).startswith("3 problems")


@pytest.mark.parametrize(("given", "left"), [("1", None), ("3", "3"), (None, None)])
def test_only_torchruns_default_of_one_thread_is_dropped(given: str | None, left: str | None) -> None:
    environ = {} if given is None else {"OMP_NUM_THREADS": given}
    drop_default_threads(environ)
    assert environ.get("OMP_NUM_THREADS") == left


FAKE_TORCHRUN = """
import os, subprocess, sys
size = int(sys.argv[1])
children = [
    subprocess.Popen([sys.executable, "-m", "fastserve.model_worker", *sys.argv[2:]],
        env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    for rank in range(size)
]
print(*(child.pid for child in children), flush=True)
print(*(child.wait() for child in children), flush=True)
"""


def wait_ready(process: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url + "/ready", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the worker did not start (exit code {process.poll()})")


def end_tree(process: subprocess.Popen[str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
        child.kill()
    process.kill()
    process.wait()


def flags(port: int, *more: str) -> list[str]:
    folder = str(demo_model_path())
    return ["--model-path", folder, "--model-names", "m", "--port", str(port), "--no-register", *more]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_processes_that_wait_end_with_the_one_that_serves(end: signal.Signals) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-c", FAKE_TORCHRUN, "2", *flags(port, "--engine", "fake")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        serving, waiting = map(int, process.stdout.readline().split())
        wait_ready(process, f"http://127.0.0.1:{port}")
        assert psutil.pid_exists(waiting)
        os.kill(serving, end)
        code, code_of_waiting = process.stdout.readline().split()
        assert code == ("0" if end == signal.SIGTERM else str(-end))
        assert code_of_waiting in ("0", "1")  # 1: it had not found the other one yet
    finally:
        end_tree(process)


def test_a_process_without_the_first_one_says_so() -> None:
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-m", "fastserve.model_worker", *flags(port, "--engine", "fake")],
        env=os.environ | variables(1, 2),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "LOCAL_RANK=0" in done.stderr


@pytest.mark.slow
def test_torchrun_starts_a_worker_of_two_ranks() -> None:
    (port,) = free_ports(1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen([*torchrun, "-m", "fastserve.model_worker", *flags(port, "--device", "cpu")], text=True)
    try:
        wait_ready(process, f"http://127.0.0.1:{port}")
        assert num_followers(psutil.Process(process.pid)) == 1
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "What is 7 + 5?"}]
            answer = client.chat.completions.create(model="m", messages=messages, temperature=0)
        assert "12" in (answer.choices[0].message.content or "")
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT_S)
        eventually(lambda: not is_open(port))
    finally:
        end_tree(process)


def num_followers(process: psutil.Process) -> int:
    return sum("fastserve.engine.gang_follower" in child.cmdline() for child in process.children(recursive=True))


def is_open(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
