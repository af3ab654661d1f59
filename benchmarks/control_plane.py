"""What the controller costs with many workers: `python -m benchmarks.control_plane`.

Mock workers in a few processes send a heartbeat a second each over connections of their own; beside them an API
server's questions are asked one after the other (acquire, release) for the latencies, then by several clients at once
for the rate. Printed for each number of workers and of open leases: the controller's share of a core for the heartbeats
alone (its own CPU time, not the clock on the wall), the latencies of `/acquire`, pairs of acquire and release in a
second, heartbeats that came to nothing, and memory for each worker. Latencies count as ratios to those with 2 workers
only, and the mock workers themselves take a good part of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, cast

import psutil
import uvloop

from fastserve.access.cluster_key import ENV_CLUSTER_KEY
from fastserve.protocol import AcquireRequest, HeartbeatRequest, ReleaseRequest, WorkerStatus

MODEL = "m"
NUM_MODELS = 10
"""The workers are spread over so many models; the questions are about one."""
START_TIMEOUT_S = 30.0
MAX_LATE_S = 0.02


class Connection(asyncio.Protocol):
    """One keep-alive connection that is asked one thing at a time, without the cost of an HTTP library."""

    def __init__(self) -> None:
        self._answer = b""
        self._waiter: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self.num_answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, blank, body = self._answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if not blank or length is None or len(body) < int(length[1]):
            return
        self._answer = b""
        self.num_answers += head.startswith(b"HTTP/1.1 200")
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(body)

    def send(self, request: bytes) -> None:
        assert self._transport is not None
        self._transport.write(request)

    async def ask(self, request: bytes) -> bytes:
        self._waiter = asyncio.get_running_loop().create_future()
        self.send(request)
        return await asyncio.wait_for(self._waiter, 10.0)


class Sender(asyncio.Protocol):
    """A worker's connection: its answers are counted only."""

    def __init__(self) -> None:
        self.num_answers = 0
        self.num_sent = 0
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        self.is_lost = True

    def data_received(self, data: bytes) -> None:
        self.num_answers += data.count(b"HTTP/1.1 200")


def post(path: str, body: bytes, key: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
        f"User-Agent: Python/3 aiohttp/3\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def lease_of(worker: int, number: int) -> str:
    return f"{worker:012x}{number:012x}"


def heartbeat(worker: int, num_leases: int, key: str) -> bytes:
    status = WorkerStatus(
        model_names=[MODEL if worker % NUM_MODELS == 0 or worker < 2 else f"{MODEL}{worker % NUM_MODELS}"],
        leases=[lease_of(worker, number) for number in range(num_leases)],
        queue_length=num_leases,
        tokens_per_s=100.0 + worker % 7,
        heartbeat_interval_s=1.0,
        context_length=4096,
        max_concurrency=32,
        kv_usage=0.25,
        version="1",
    )
    address = f"http://127.0.{worker // 250}.{worker % 250}:20002"
    message = HeartbeatRequest(worker_name=address, queue_length=num_leases, status=status)
    return post("/receive_heart_beat", message.model_dump_json().encode(), key)


async def beat(port: int, workers: range, num_leases: int, key: str, warm: Event, stop: Event) -> tuple[int, int]:
    """Heartbeats of these workers, spread evenly over each second; returns how many were due since `warm`, and how many
    of these could not be sent because the one before had no answer yet.
    """
    loop = asyncio.get_running_loop()
    senders = []
    for worker in workers:
        _, connection = await loop.create_connection(Sender, "127.0.0.1", port)
        senders.append((connection, heartbeat(worker, num_leases, key)))
    last, num_due, due, num_lost, num_cold = time.monotonic(), 0, 0.0, 0, 0
    while not stop.is_set():
        now = time.monotonic()
        # What this process is late with itself is not made up for: a burst would be measured as the controller's delay.
        due += min(now - last, MAX_LATE_S) * len(senders)
        last = now
        while num_due < due:
            connection, request = senders[num_due % len(senders)]
            num_due += 1
            # As workers do: the next heartbeat waits for the answer to the last one.
            if connection.num_answers == connection.num_sent and not connection.is_lost:
                connection.num_sent += 1
                connection.transport.write(request)
            else:
                num_lost += 1
        await asyncio.sleep(0.005)
        if not warm.is_set():
            num_cold, num_lost = num_due, 0
    return num_due - num_cold, num_lost


def run_workers(port: int, workers: range, num_leases: int, key: str, warm: Event, stop: Event, results: Any) -> None:
    results.put(uvloop.run(beat(port, workers, num_leases, key, warm, stop)))


@dataclass
class Asked:
    latencies_s: list[float]
    """Of `/acquire`."""
    pairs_per_s: float


async def ask(port: int, key: str, num_clients: int, seconds: float, pause_s: float) -> Asked:
    """Acquire and release, again and again, by each of the clients."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
        count = 0
        while time.monotonic() < end:
            lease = f"client{number}-{count}"
            count += 1
            acquire = AcquireRequest(model=MODEL, lease=lease).model_dump_json().encode()
            began = time.perf_counter()
            await connection.ask(post("/acquire", acquire, key))
            latencies.append(time.perf_counter() - began)
            await connection.ask(post("/release", ReleaseRequest(leases=[lease]).model_dump_json().encode(), key))
            await asyncio.sleep(pause_s)

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    return Asked(latencies, len(latencies) / seconds)


@dataclass
class Row:
    workers: int
    leases: int
    cpu_share: float
    acquire_p50_s: float
    acquire_p99_s: float
    pairs_per_s: float
    lost: float
    bytes_per_worker: float


class Controller:
    def __init__(self, folder: Path, key: str) -> None:
        self._headers = {"Authorization": f"Bearer {key}"}
        self._log = folder / "controller.log"
        command = [sys.executable, "-m", "fastserve.controller", "--host", "127.0.0.1", "--port", "0"]
        # The workers exist by name only.
        command += ["--no-worker-probe", "--allowed-worker-networks", "any"]
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(command, stdout=log, stderr=log)
        self._process = psutil.Process(self._popen.pid)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"Uvicorn running on http://\S+:(\d+)", self._log.read_text())):
            if time.monotonic() > deadline or self._popen.poll() is not None:
                raise SystemExit(f"The controller does not start: {self._log.read_text()}")
            time.sleep(0.05)
        self.port = int(found[1])

    @property
    def cpu_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    @property
    def resident_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def wait_for_workers(self, count: int) -> None:
        """All of them are known, and have sent a second heartbeat or so."""
        deadline = time.monotonic() + START_TIMEOUT_S
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/ready", headers=self._headers)
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as response:
                if json.load(response)["workers"] == count:
                    return
            time.sleep(0.5)
        raise SystemExit(f"{count} workers are not registered after {START_TIMEOUT_S:g} s.")

    def stop(self) -> None:
        self._popen.kill()
        self._popen.wait()


def measure(num_workers: int, num_leases: int, seconds: float, num_processes: int, key: str) -> Row:
    context = multiprocessing.get_context("spawn")
    warm, stop, results = context.Event(), context.Event(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        controller = Controller(Path(folder), key)
        try:
            resident = controller.resident_bytes
            size = -(-num_workers // num_processes)
            shares = [range(at, min(at + size, num_workers)) for at in range(0, num_workers, size)]
            per_worker = num_leases // num_workers
            senders = [
                context.Process(
                    target=run_workers, args=(controller.port, share, per_worker, key, warm, stop, results), daemon=True
                )
                for share in shares
            ]
            for sender in senders:
                sender.start()
            controller.wait_for_workers(num_workers)
            time.sleep(2.0)
            warm.set()
            began, cpu_s = time.monotonic(), controller.cpu_s
            time.sleep(seconds)
            share = (controller.cpu_s - cpu_s) / (time.monotonic() - began)
            grown = controller.resident_bytes - resident
            calm = uvloop.run(ask(controller.port, key, 1, seconds, 0.002))
            busy = uvloop.run(ask(controller.port, key, 8, seconds / 2, 0.0))
            stop.set()
            counts = [results.get(timeout=20.0) for _ in senders]
            for sender in senders:
                sender.join()
        finally:
            stop.set()
            controller.stop()
    num_due, num_lost = (sum(column) for column in zip(*counts, strict=True))
    centiles = statistics.quantiles(calm.latencies_s, n=100)
    return Row(
        num_workers,
        per_worker * num_workers,
        share,
        centiles[49],
        centiles[98],
        busy.pairs_per_s,
        num_lost / num_due,
        grown / num_workers,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 500, 1000, 5000])
    parser.add_argument("--leases", type=int, nargs="+", default=[0, 50_000])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each part of a row")
    parser.add_argument("--processes", type=int, default=2, help="that the mock workers run in")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The controllers inherit it.
    key = os.environ.setdefault(ENV_CLUSTER_KEY, secrets.token_urlsafe(32))
    print("| workers | open leases | share of a core | acquire p50 / p99, ms | pairs/s | lost | kB a worker |")
    print("|---|---|---|---|---|---|---|")
    for num_leases in args.leases:
        for num_workers in args.workers:
            if num_leases and num_leases // num_workers > 1000:
                continue
            row = measure(num_workers, num_leases, args.seconds, args.processes, key)
            print(
                f"| {row.workers:,} | {row.leases:,} | {row.cpu_share:.0%} | {1e3 * row.acquire_p50_s:.2f} / "
                f"{1e3 * row.acquire_p99_s:.2f} | {row.pairs_per_s:.0f} | {row.lost:.1%} | "
                f"{row.bytes_per_worker / 1e3:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
