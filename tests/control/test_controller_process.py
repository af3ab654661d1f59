"""The controller as a process."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fastserve.protocol import HeartbeatRequest, WorkerStatus

RSS_LIMIT = 120e6
PATIENCE_S = 15.0
ResultT = TypeVar("ResultT")


class ControllerProcess:
    def __init__(self, folder: Path) -> None:
        self._log = folder / "controller.log"
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, after `kill` on the same port."""
        command = [sys.executable, "-m", "fastserve.controller", "--host", "127.0.0.1", "--port", str(self.port)]
        # The workers of these tests are only names.
        command += ["--insecure", "--no-worker-probe", "--allowed-worker-networks", "any"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        found = wait_for(lambda: re.search(r"Uvicorn running on (http://\S+:(\d+))", self._log.read_text()))
        self.address, self.port = found[1], int(found[2])

    def log(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_S)


class HeartbeatSender:
    """A worker on a thread: sends a heartbeat with its whole status every `interval_s`, whatever the answer."""

    def __init__(self, controller: str, address: str, status: WorkerStatus) -> None:
        assert status.heartbeat_interval_s
        self._url = f"{controller}/receive_heart_beat"
        self._interval_s = status.heartbeat_interval_s
        self._body = HeartbeatRequest(
            worker_name=address, queue_length=status.queue_length, status=status
        ).model_dump_json()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> HeartbeatSender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client() as client:
            while not self._stop.wait(self._interval_s):
                try:
                    client.post(self._url, content=self._body, headers={"content-type": "application/json"})
                except httpx.TransportError:
                    continue  # the controller is away; the next heartbeat has the whole status


def wait_for(found: Callable[[], ResultT | None]) -> ResultT:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.01)
    raise AssertionError("waited in vain")


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    controller = ControllerProcess(tmp_path)
    try:
        yield controller
    finally:
        controller.kill()


def addresses(controller: ControllerProcess) -> list[str]:
    return [w["address"] for w in httpx.get(f"{controller.address}/workers").raise_for_status().json()["workers"]]


def in_flight(controller: ControllerProcess) -> list[int]:
    return [w["in_flight"] for w in httpx.get(f"{controller.address}/workers").raise_for_status().json()["workers"]]


def test_it_starts_alone_stays_small_and_stops(controller: ControllerProcess) -> None:
    assert httpx.get(f"{controller.address}/health").json() == {"status": "ok"}
    assert httpx.post(f"{controller.address}/list_models").json() == {"models": []}
    assert httpx.get(f"{controller.address}/metrics").status_code == 200
    process = psutil.Process(controller.process.pid)
    resident = sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])
    assert resident < RSS_LIMIT
    controller.stop()


def test_it_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import fastserve.controller, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_wrong_dispatch_method_is_answered_with_the_known_ones() -> None:
    command = [sys.executable, "-m", "fastserve.controller", "--dispatch-method", "guess"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 2
    assert re.search(r"guess.*lottery.*shortest_queue", ended.stderr)


def test_a_restarted_controller_is_whole_again_within_one_interval(controller: ControllerProcess) -> None:
    interval_s = 1.0
    status = WorkerStatus(model_names=["m"], queue_length=2, leases=["a", "b"], heartbeat_interval_s=interval_s)
    with HeartbeatSender(controller.address, "http://w:1", status):
        wait_for(lambda: addresses(controller))
        controller.kill()
        controller.start()
        answering = time.monotonic()
        wait_for(lambda: addresses(controller))
        assert time.monotonic() - answering < interval_s + 0.9
        assert in_flight(controller) == [2]


def test_a_killed_worker_is_out_at_once_when_reported_and_soon_when_not(controller: ControllerProcess) -> None:
    status = WorkerStatus(model_names=["m"], heartbeat_interval_s=0.1)
    with HeartbeatSender(controller.address, "http://w:1", status):
        wait_for(lambda: addresses(controller))
    killed = time.monotonic()
    httpx.post(f"{controller.address}/report_failure", json={"worker_name": "http://w:1"})
    assert addresses(controller) == []
    answer = httpx.post(f"{controller.address}/acquire", json={"model": "m", "lease": "1"}).json()
    assert answer == {"address": "", "known": True, "retry_after_s": 1.0}
    wait_for(lambda: httpx.post(f"{controller.address}/list_models").json()["models"] == [])
    assert time.monotonic() - killed < 3.5


def test_a_controller_that_was_held_up_does_not_take_its_workers_for_silent(controller: ControllerProcess) -> None:
    status = WorkerStatus(model_names=["m"], queue_length=1, leases=["a"], heartbeat_interval_s=0.8)
    with HeartbeatSender(controller.address, "http://w:1", status):
        wait_for(lambda: addresses(controller))
        controller.process.send_signal(signal.SIGSTOP)
        time.sleep(3.5)
        controller.process.send_signal(signal.SIGCONT)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert addresses(controller) == ["http://w:1"]
            assert in_flight(controller) == [1]
    assert "is dropped" not in controller.log()


async def test_a_client_that_leaves_the_relay_stops_the_worker(controller: ControllerProcess) -> None:
    left = asyncio.Event()

    async def worker_generate_stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b'{"text": "a", "error_code": 0}\0')
                await asyncio.sleep(0.01)
        finally:
            left.set()

    app = web.Application()
    app.router.add_post("/worker_generate_stream", worker_generate_stream)
    async with TestServer(app) as worker, httpx.AsyncClient(base_url=controller.address) as client:
        await client.post(
            "/register_worker",
            json={
                "worker_name": str(worker.make_url("")).rstrip("/"),
                "check_heart_beat": True,
                "worker_status": {"model_names": ["m"], "speed": 1, "queue_length": 0},
            },
        )
        async with client.stream("POST", "/worker_generate_stream", json={"model": "m"}) as response:
            async for piece in response.aiter_bytes():
                assert piece.startswith(b'{"text": "a"')
                break
            assert in_flight(controller) == [1]
        async with asyncio.timeout(1):
            await left.wait()
        await asyncio.to_thread(wait_for, lambda: in_flight(controller) == [0])
