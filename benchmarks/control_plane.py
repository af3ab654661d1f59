"""Controller cost with many workers: `python -m benchmarks.control_plane`.

One process of mock workers sends one heartbeat a second for each of them, each over its own connection and at its own
phase within the second. It uses plain sockets and prebuilt bytes, so it needs little CPU time. At the same time, an API
server's client acquires and releases leases. With two or more cores the controller has the first one to itself, and
mock workers and clients share the others.

Printed for each number of workers and of open leases: the controller's CPU share for the heartbeats alone, the latency
of `/acquire` from the client's send until the kernel has received the answer (so without the client's wait for a core),
pairs of acquire and release per second by 8 clients, lost heartbeats, and resident memory per worker. Each heartbeat
differs from the previous one: another KV cache usage and, if the worker has leases, one that has ended and a new one.
`--unchanged` repeats the same heartbeat.

Arms are interleaved `--rounds` times, and medians printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import secrets
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil

from fastserve.access.cluster_key import ENV_CLUSTER_KEY
from fastserve.protocol import AcquireRequest, HeartbeatRequest, ReleaseRequest, WorkerStatus

MODEL = "m"
NUM_MODELS = 10
"""Models that the workers are spread over; the client asks for one of them."""
NUM_VARIANTS = 4
"""Different heartbeats of a worker, sent in rotation."""
START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 10.0
MAX_LATE_S = 0.02
MAX_PAUSE_S = 0.004
"""Maximum of the latency client's random pause between two pairs."""
NUM_CLIENTS = 8
SO_TIMESTAMPNS = 35
"""Linux socket option that adds a receive timestamp to packets. Missing in Python's `socket`."""
_TIMESPEC = struct.Struct("qq")
_ANSWERED = b"HTTP/1.1 200"
_ANSWER = re.compile(_ANSWERED + rb".*?\r\ncontent-length: (\d+)\r\n(?:.*?\r\n)?\r\n", re.S)


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def post(path: str, body: bytes, key: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
        f"User-Agent: Python/3 aiohttp/3\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def heartbeat(worker: int, num_leases: int, variant: int, key: str) -> bytes:
    status = WorkerStatus(
        model_names=[MODEL if worker % NUM_MODELS == 0 or worker < 2 else f"{MODEL}{worker % NUM_MODELS}"],
        leases=[f"{worker:012x}{number:012x}" for number in range(variant, variant + num_leases)],
        queue_length=num_leases,
        tokens_per_s=100.0 + worker % 7,
        heartbeat_interval_s=1.0,
        context_length=4096,
        max_concurrency=32,
        kv_usage=0.25 + variant / 64,
        version="1",
    )
    address = f"http://127.0.{worker // 250}.{worker % 250}:20002"
    message = HeartbeatRequest(worker_name=address, queue_length=num_leases, status=status)
    return post("/receive_heart_beat", message.model_dump_json().encode(), key)


class MockWorker:
    def __init__(self, port: int, heartbeats: Sequence[bytes]) -> None:
        self._socket = connect(port)
        self._socket.setblocking(False)
        self._heartbeats = heartbeats
        self._num_sent = 0
        self._is_waiting = False

    def beat(self) -> bool:
        """Send the next heartbeat if the last one was answered with 200. Returns whether it was sent."""
        try:
            if self._is_waiting and not self._socket.recv(4096).startswith(_ANSWERED):
                return False
            self._socket.send(self._heartbeats[self._num_sent % len(self._heartbeats)])
        except OSError:  # no answer yet, or a lost connection
            return False
        self._num_sent += 1
        self._is_waiting = True
        return True


def run_workers(
    port: int, num_workers: int, num_leases: int, num_variants: int, key: str, warm: Event, stop: Event, counts: Any
) -> None:
    """Send heartbeats until `stop`. Puts the number due since `warm`, and the number lost of these, into `counts`."""
    workers = []
    for number in range(num_workers):
        variants = [heartbeat(number, num_leases, variant, key) for variant in range(num_variants)]
        workers.append(MockWorker(port, variants))
    rng = random.Random(0)
    phases_s = sorted(rng.random() for _ in workers)
    began, num_due, num_lost = time.monotonic(), 0, 0
    is_warm = False
    while not stop.is_set():
        if not is_warm and warm.is_set():
            is_warm, num_due, num_lost = True, 0, 0
        for phase_s, worker in zip(phases_s, workers, strict=True):
            late_s = time.monotonic() - began - phase_s
            if late_s < 0:
                time.sleep(-late_s)
            elif late_s > MAX_LATE_S:
                # This process was delayed. Catching up in a burst would be measured as delay of the controller.
                began += late_s
            num_due += 1
            num_lost += not worker.beat()
        began += 1.0
    counts.put((num_due, num_lost))


class Client:
    """An API server's connection, with one request at a time."""

    def __init__(self, port: int, key: str, name: str) -> None:
        self.socket = connect(port)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._key = key
        self._name = name
        self._num_leases = 0

    def acquire(self) -> None:
        self._num_leases += 1
        message = AcquireRequest(model=MODEL, lease=f"{self._name}-{self._num_leases}")
        self.socket.sendall(post("/acquire", message.model_dump_json().encode(), self._key))

    def release(self) -> None:
        message = ReleaseRequest(leases=[f"{self._name}-{self._num_leases}"])
        self.socket.sendall(post("/release", message.model_dump_json().encode(), self._key))

    def read_answer(self) -> int:
        """Read one answer. Returns when the kernel had received it, in nanoseconds of the wall clock."""
        answer = b""
        while True:
            piece, ancillary, _, _ = self.socket.recvmsg(4096, 64)
            answer += piece
            found = _ANSWER.match(answer)
            if not piece or (found is None and b"\r\n\r\n" in answer):
                raise SystemExit(f"The controller answers {answer[:200]!r}.")
            if found is not None and len(answer) == found.end() + int(found[1]):
                if not ancillary:  # the kernel's first packets may lack a timestamp
                    return time.time_ns()
                seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
                return int(seconds * 1_000_000_000 + nanoseconds)


def acquire_latencies(port: int, key: str, seconds: float) -> list[float]:
    """Latencies in seconds of one client that pauses between its requests."""
    client, rng, latencies = Client(port, key, "calm"), random.Random(1), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began_ns = time.time_ns()
        client.acquire()
        latencies.append((client.read_answer() - began_ns) / 1e9)
        client.release()
        client.read_answer()
        time.sleep(rng.random() * MAX_PAUSE_S)
    client.socket.close()
    return latencies


def pairs_per_s(port: int, key: str, seconds: float) -> float:
    """Pairs of acquire and release by clients that never pause."""
    clients = {client.socket.fileno(): client for client in (Client(port, key, f"c{n}") for n in range(NUM_CLIENTS))}
    poll, num_answers = select.epoll(), 0
    began = time.monotonic()
    has_lease = dict.fromkeys(clients, True)
    for number, client in clients.items():
        poll.register(number, select.EPOLLIN)
        client.acquire()
    while (took_s := time.monotonic() - began) < seconds:
        for number, _ in poll.poll(ANSWER_TIMEOUT_S):
            client = clients[number]
            client.read_answer()
            num_answers += 1
            if has_lease[number]:
                client.release()
            else:
                client.acquire()
            has_lease[number] = not has_lease[number]
    poll.close()
    for client in clients.values():
        client.socket.close()
    return num_answers / 2 / took_s


@dataclass
class Row:
    cpu_share: float
    acquire_p50_s: float
    acquire_p99_s: float
    pairs_per_s: float
    lost: float
    bytes_per_worker: float


class ControllerProcess:
    def __init__(self, folder: Path, key: str, cores: set[int]) -> None:
        """`cores`: the CPU cores that the controller runs on."""
        self._headers = {"Authorization": f"Bearer {key}"}
        self._log = folder / "controller.log"
        command = [sys.executable, "-m", "fastserve.controller", "--host", "127.0.0.1", "--port", "0"]
        # The workers exist by name only.
        command += ["--no-worker-probe", "--allowed-worker-networks", "any"]
        own_cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            with self._log.open("wb") as log:
                self._popen = subprocess.Popen(command, stdout=log, stderr=log)
        finally:
            os.sched_setaffinity(0, own_cores)
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


def measure(num_workers: int, num_leases: int, num_variants: int, seconds: float, key: str, cores: set[int]) -> Row:
    context = multiprocessing.get_context("spawn")
    warm, stop, counts = context.Event(), context.Event(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        controller = ControllerProcess(Path(folder), key, cores)
        try:
            resident = controller.resident_bytes
            arguments = (controller.port, num_workers, num_leases // num_workers, num_variants, key, warm, stop, counts)
            workers = context.Process(target=run_workers, args=arguments, daemon=True)
            workers.start()
            controller.wait_for_workers(num_workers)
            time.sleep(2.0)  # each one's second heartbeat, the first that is answered directly
            warm.set()
            began, cpu_s = time.monotonic(), controller.cpu_s
            time.sleep(seconds)
            share = (controller.cpu_s - cpu_s) / (time.monotonic() - began)
            grown = controller.resident_bytes - resident
            latencies = acquire_latencies(controller.port, key, seconds)
            rate = pairs_per_s(controller.port, key, seconds / 2)
            stop.set()
            num_due, num_lost = counts.get(timeout=ANSWER_TIMEOUT_S)
            workers.join()
        finally:
            stop.set()
            controller.stop()
    centiles = statistics.quantiles(latencies, n=100)
    return Row(share, centiles[49], centiles[98], rate, num_lost / num_due, grown / num_workers)


def median_row(rows: Sequence[Row]) -> Row:
    return Row(*(statistics.median(column) for column in zip(*(vars(row).values() for row in rows), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 500, 1000, 5000])
    parser.add_argument("--leases", type=int, nargs="+", default=[0, 50_000], help="open ones, of all workers together")
    parser.add_argument("--unchanged", action="store_true", help="each worker repeats its heartbeat")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each part of a row")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The controllers inherit it.
    key = os.environ.setdefault(ENV_CLUSTER_KEY, secrets.token_urlsafe(32))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[1:])  # mock workers inherit it
    num_variants = 1 if args.unchanged else NUM_VARIANTS
    arms = [
        (num_workers, num_leases // num_workers * num_workers)
        for num_leases in args.leases
        for num_workers in args.workers
        if num_leases // num_workers <= 1000
    ]
    rounds = [
        [measure(*arm, num_variants, args.seconds, key, set(cores[:1])) for arm in arms] for _ in range(args.rounds)
    ]
    print("| workers | open leases | share of a core | acquire p50 / p99, ms | pairs/s | lost | kB a worker |")
    print("|---|---|---|---|---|---|---|")
    for (num_workers, num_leases), rows in zip(arms, zip(*rounds, strict=True), strict=True):
        row = median_row(rows)
        print(
            f"| {num_workers:,} | {num_leases:,} | {row.cpu_share:.0%} | {1e3 * row.acquire_p50_s:.2f} / "
            f"{1e3 * row.acquire_p99_s:.2f} | {row.pairs_per_s:.0f} | {row.lost:.1%} | "
            f"{row.bytes_per_worker / 1e3:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
