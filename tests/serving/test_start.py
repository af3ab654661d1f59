"""SIGTERM while the application still starts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import asyncio, contextlib, subprocess, sys
from fastapi import FastAPI
from fastserve.config import ServerConfig
from fastserve.observability.logging import setup_logging
from fastserve.serving.listen import bind
from fastserve.serving.server import serve

@contextlib.asynccontextmanager
async def lifespan(app):
    child = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        print("starting", child.pid, flush=True)
        await asyncio.sleep(60)
        yield
    finally:
        child.kill()
        await child.wait()
        print("cleaned up", flush=True)

setup_logging("info", "test", {})
config = ServerConfig(host="127.0.0.1", port=0)
serve(FastAPI(lifespan=lifespan), config, bind(config.host, config.port))
print("returned", flush=True)
"""
PATIENCE_S = 3.0


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        yield process
        process.kill()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_start_at_once_and_in_order(
    starting: subprocess.Popen[str], signal_number: signal.Signals, tmp_path: Path
) -> None:
    assert starting.stdout is not None
    word, child = starting.stdout.readline().split()
    assert word == "starting"
    begin = time.monotonic()
    starting.send_signal(signal_number)
    assert starting.wait(PATIENCE_S) == 0
    assert time.monotonic() - begin < PATIENCE_S
    assert starting.stdout.read().split("\n")[:2] == ["cleaned up", "returned"]
    assert not psutil.pid_exists(int(child))
    log = (tmp_path / "log").read_text()
    assert "The start was ended by a signal." in log
    assert "Traceback" not in log
