"""The trio as real processes: a controller, two workers of the demo model on the native engine, an API server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

from fastserve.protocol import RoutingTable
from tests.keys import CLUSTER
from tests.processes import free_ports, is_alive

START_TIMEOUT_S = 90.0
"""A worker imports torch and measures its speed, which may take long on a busy machine."""
STOP_TIMEOUT_S = 45.0
"""A little more than a service's own drain time."""


def get(url: str) -> bytes | None:
    """GET with the cluster key; returns the body of a 200, else None."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=CLUSTER), timeout=5) as response:
            return bytes(response.read())
    except OSError:
        return None


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


class Service:
    """One process of the trio, which can be restarted with the same command."""

    def __init__(self, name: str, module: str, flags: list[str], folder: Path) -> None:
        [port] = free_ports(1)
        self.name = name
        self.address = f"http://127.0.0.1:{port}"
        self._command = [
            sys.executable,
            "-m",
            f"fastserve.{module}",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *flags,
        ]
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} has not been started"
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        # One thread for each engine: two of them share the cores of a small machine.
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def serves(self, path: str = "/health") -> bool:
        """Whether the route answers with 200. Fails when the process has ended."""
        assert self.running, f"{self.name} ended with exit code {self.process.returncode}:\n{self.log[-2000:]}"
        return get(self.address + path) is not None

    def wait_serving(self, path: str = "/health") -> None:
        wait_until(lambda: self.serves(path), f"{self.name} serves {path}", START_TIMEOUT_S)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Send SIGTERM, and then SIGKILL to a process that still runs, and to its children."""
        if not self.running:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        for child in children:
            if is_alive(child.pid):
                child.kill()

    def engine_pid(self) -> int:
        """Process id of a worker's engine process."""
        children = psutil.Process(self.process.pid).children()
        [engine] = [child.pid for child in children if "fastserve.engine.process" in child.cmdline()]
        return engine

    def rss_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6


class Trio:
    def __init__(self, folder: Path) -> None:
        self.controller = Service("controller", "controller", [], folder)
        to_controller = ["--controller-address", self.controller.address]
        # By default each worker would take 2 GB for the KV cache. The demo model repeats itself when it may not
        # end: without speculation long answers take long, so that something can happen while they run.
        sizes = ["--max-total-tokens", "32768", "--speculative-method", "off"]
        self.workers = [
            Service(f"worker-{number}", "model_worker", [*to_controller, *sizes], folder) for number in (1, 2)
        ]
        stores = ["--responses-store", str(folder / "responses.db"), "--batches-folder", str(folder / "batches")]
        self.server = Service("server", "openai_api_server", [*to_controller, *stores], folder)

    @property
    def services(self) -> list[Service]:
        return [self.controller, *self.workers, self.server]

    def make_whole(self) -> None:
        """Start the processes that do not run, and wait until both workers are in dispatch."""
        for service in self.services:
            if not service.running:
                service.start()
        for service in self.services:
            # A worker is healthy while its model loads.
            service.wait_serving("/ready" if service in self.workers else "/health")
        wait_until(
            lambda: self.table() == {worker.address for worker in self.workers}, "both registered", START_TIMEOUT_S
        )
        self.server.wait_serving("/ready")

    def table(self) -> set[str]:
        """The workers that are in dispatch."""
        body = get(self.controller.address + "/workers")
        if body is None:
            return set()
        return {row.address for row in RoutingTable.model_validate_json(body).workers if row.status.ready}

    def stop(self) -> None:
        for service in (self.server, *self.workers, self.controller):
            service.stop()
