"""Good clients during attacks: `python -m benchmarks.attacks`.

Starts a trio with the demo model and keeps 8 clients asking questions, in alternating windows of `--seconds`,
`--rounds` of each kind:

- quiet: the good clients alone;
- attacked: during an attack by another process, so that its work does not delay the good clients' event loop;
- busy cores: during a CPU burner that uses as much CPU time as the attacker did in the window before, without any
  connection. On one machine attackers take cores from the services; this shows the effect of that alone.

A row of the table pools the requests of each kind: the good clients' requests, lost or wrong ones, p99 latency and its
ratio to the quiet one; the attacker's CPU cores; the services' additional CPU cores compared with the quiet windows;
and the growth of their resident memory. A client's first request of a window, sent while all clients open their
connections, counts only if it is lost or wrong. Everything is on the loopback device and bounded in number and time.

`--only NAME` runs one attack. The attacks are tests too (`tests/attacks`), which assert that nothing is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import multiprocessing
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
from aiohttp import web

MODEL = "fastserve-demo"
NUM_GOOD_CLIENTS = 8
QUESTIONS = {f"What is {a} + {b}?": str(a + b) for a in (3, 7, 12) for b in (5, 8)}
START_TIMEOUT_S = 120.0
BURST_S = 0.02


# ---- the services under attack ----------------------------------------------------------------------------------


@dataclass
class Target:
    """Addresses of a trio, its cluster key, and the pids of its three services."""

    server: str
    controller: str
    worker: str
    cluster_key: str
    pids: tuple[int, ...]
    until: float = 0.0
    """End of the running attack, in seconds of the monotonic clock."""

    @property
    def running(self) -> bool:
        return time.monotonic() < self.until

    @property
    def member(self) -> dict[str, str]:
        """Headers with the cluster key."""
        return {"Authorization": f"Bearer {self.cluster_key}"}

    def rss_mb(self) -> float:
        """Resident memory of the services and their child processes, in MB."""
        total = 0
        for pid in self.pids:
            process = psutil.Process(pid)
            for one in (process, *process.children(recursive=True)):
                try:
                    total += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
        return total / 1e6

    def cpu_s(self) -> float:
        """CPU time of the services and their child processes, in seconds."""
        total = 0.0
        for pid in self.pids:
            process = psutil.Process(pid)
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = one.cpu_times()
                    total += times.user + times.system
        return total


def free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@contextmanager
def running_trio(folder: Path) -> Iterator[Target]:
    """A controller, a worker of the demo model and an API server, as processes; their logs are in `folder`."""
    controller, worker, server = (f"http://127.0.0.1:{port}" for port in free_ports(3))
    key = secrets.token_hex(24)
    to_controller = ["--controller-address", controller]
    sizes = ["--max-total-tokens", "32768", "--max-num-seqs", "64"]
    commands = {
        "controller": (controller, []),
        "model_worker": (worker, [*to_controller, *sizes]),
        "openai_api_server": (server, to_controller),
    }
    env = {**os.environ, "FASTSERVE_CLUSTER_KEY": key, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for module, (address, flags) in commands.items():
            port = str(urlsplit(address).port)
            with (folder / f"{module}.log").open("wb") as log:
                command = [sys.executable, "-m", f"fastserve.{module}", "--host", "127.0.0.1", "--port", port, *flags]
                processes.append(
                    subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
                )
        target = Target(server, controller, worker, key, tuple(process.pid for process in processes))
        asyncio.run(_wait_ready(target, processes, folder))
        yield target
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ends_of_logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-1000:] for path in folder.glob("*.log"))


async def _wait_ready(target: Target, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as http:
        while True:
            if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
                raise RuntimeError("the services did not start:\n" + _ends_of_logs(folder))
            try:
                async with http.get(target.server + "/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


# ---- good clients -----------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Latencies and failures of the good clients."""

    latencies_s: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def p99_s(self) -> float:
        return statistics.quantiles(self.latencies_s, n=100)[98] if len(self.latencies_s) > 1 else float("nan")


@asynccontextmanager
async def good_clients(target: Target, clients: int = NUM_GOOD_CLIENTS) -> AsyncIterator[Seen]:
    """Clients that ask questions with known answers until the block is left; every second answer is streamed."""
    seen = Seen()
    stopping = asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=60)

    async def ask_on(http: aiohttp.ClientSession, start: int) -> None:
        for number in itertools.count(start):
            if stopping.is_set():
                return
            text, answer = list(QUESTIONS.items())[number % len(QUESTIONS)]
            began = time.monotonic()
            problem = await _ask(http, target.server, text, answer, stream=number % 2 == 0)
            if number > start:
                seen.latencies_s.append(time.monotonic() - began)
            if problem:
                seen.lost.append(problem)
            await asyncio.sleep(0.02)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        tasks = [asyncio.create_task(ask_on(http, start)) for start in range(clients)]
        try:
            yield seen
        finally:
            stopping.set()
            await asyncio.gather(*tasks)


async def _ask(http: aiohttp.ClientSession, server: str, text: str, answer: str, *, stream: bool) -> str | None:
    """The failure of one request, or None."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "stream": stream}
    try:
        async with http.post(server + "/v1/chat/completions", json={**body, "max_tokens": 30}) as response:
            raw = await response.text()
            if response.status != 200:
                return f"status {response.status}: {raw[:200]}"
            if not stream:
                got = json.loads(raw)["choices"][0]["message"]["content"]
            else:
                lines = [line[6:] for line in raw.split("\n") if line.startswith("data: ")]
                if lines[-1] != "[DONE]":
                    return f"a stream ended with {lines[-1][:200]}"
                chunks = [json.loads(line) for line in lines[:-1]]
                got = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    return None if answer in got else f"{text!r} was answered with {got[:100]!r}"


# ---- attacks ----------------------------------------------------------------------------------------------------
# Each runs until `target.running` is false and uses little CPU time: the services' behaviour is to be measured, not the
# loss of the cores that the attacker takes.

Attack = Callable[[Target], Coroutine[Any, Any, None]]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__.replace("_", "-")] = function
    return function


async def _post(http: aiohttp.ClientSession, url: str, body: bytes, **headers: str) -> int | None:
    """The status; None if the connection was closed."""
    try:
        async with http.post(
            url, data=body, headers={"Content-Type": "application/json", **headers}, allow_redirects=False
        ) as response:
            await response.read()
            return response.status
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=30)
    )


async def _repeat(
    target: Target, bodies: list[tuple[str, bytes]], *, at_once: int, pause_s: float, **headers: str
) -> None:
    """Post the (url, body) pairs in rotation, `at_once` of them concurrently."""
    rotation = itertools.cycle(bodies)

    async def go_on() -> None:
        while target.running:
            url, body = next(rotation)
            await _post(http, url, body, **headers)
            await asyncio.sleep(pause_s)

    async with _session() as http:
        await asyncio.gather(*(go_on() for _ in range(at_once)))


def _chat(**changes: Any) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, **changes}
    return json.dumps(body).encode()


@attack
async def heartbeats_with_senseless_numbers(target: Target) -> None:
    """A member of the cluster reports NaN, infinities and numbers of 400 digits."""
    bodies = []
    for number in ("NaN", "Infinity", "-Infinity", "1" + "0" * 400, "-1", "1e999", '"fast"', "true", "[1]"):
        for name in ("speed", "kv_usage", "tokens_per_s", "queue_length", "heartbeat_interval_s", "context_length"):
            status = f'{{"model_names": ["{MODEL}"], "{name}": {number}}}'
            for worker in (target.worker, "http://127.0.0.1:9"):
                body = f'{{"worker_name": "{worker}", "queue_length": 0, "status": {status}}}'
                bodies.append((target.controller + "/receive_heart_beat", body.encode()))
    await _repeat(target, bodies, at_once=2, pause_s=0.02, **target.member)


@attack
async def lists_full_of_errors(target: Target) -> None:
    """A million list elements, each of the wrong type."""
    zeros = [0] * 300_000
    chats, completions = target.server + "/v1/chat/completions", target.server + "/v1/completions"
    bodies = [
        (chats, _chat(messages=zeros)),
        (chats, _chat(stop=zeros)),
        (chats, _chat(logit_bias={str(i): "x" for i in range(50_000)})),
        (chats, _chat(stop_token_ids=["x"] * 100_000)),
        (chats, _chat(messages=[{"role": "user", "content": zeros}])),
        (chats, _chat(messages=[{"role": "user"}] * 50_000)),
        (completions, json.dumps({"model": MODEL, "prompt": [None] * 300_000}).encode()),
        (completions, json.dumps({"model": MODEL, "prompt": [["x"]] * 200_000}).encode()),
    ]
    await _repeat(target, bodies, at_once=2, pause_s=0.1)


@attack
async def lists_full_of_errors_between_services(target: Target) -> None:
    zeros = [0] * 200_000
    bodies = [
        (target.controller + "/acquire", json.dumps({"model": MODEL, "lease": "x", "exclude": zeros}).encode()),
        (target.controller + "/release", json.dumps({"leases": zeros}).encode()),
        (
            target.controller + "/receive_heart_beat",
            json.dumps(
                {"worker_name": target.worker, "queue_length": 0, "status": {"model_names": zeros, "leases": zeros}}
            ).encode(),
        ),
    ]
    await _repeat(target, bodies, at_once=2, pause_s=0.1, **target.member)


@attack
async def prompts_far_over_the_context(target: Target) -> None:
    """Megabytes of text for a context of 2,048 tokens, in one message and in very many."""
    chats, completions = target.server + "/v1/chat/completions", target.server + "/v1/completions"
    text = "the quick brown fox " * 350_000
    bodies = [
        (chats, _chat(messages=[{"role": "user", "content": text}])),
        (chats, _chat(messages=[{"role": "user", "content": "a"}] * 150_000)),
        (completions, json.dumps({"model": MODEL, "prompt": "\u6f22" * 1_000_000}, ensure_ascii=False).encode()),
        (completions, json.dumps({"model": MODEL, "prompt": ["word " * 2000] * 500}).encode()),
        (completions, json.dumps({"model": MODEL, "prompt": [1] * 1_000_000}).encode()),
    ]
    await _repeat(target, bodies, at_once=2, pause_s=0.1)


@attack
async def nested_json(target: Target) -> None:
    depth = 100_000
    chats = target.server + "/v1/chat/completions"
    nested = b"[" * depth + b"]" * depth
    arguments = json.dumps("[" * 5000 + "]" * 5000).encode()
    call = b'{"role":"assistant","tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":%s}}]}'
    bodies = [
        (chats, nested),
        (chats, b'{"model":"%s","messages":[{"role":"user","content":%s}]}' % (MODEL.encode(), nested)),
        (chats, b'{"model":"%s","messages":[%s]}' % (MODEL.encode(), call % arguments)),
        (chats, b'{"x":' * depth + b"1" + b"}" * depth),
    ]
    await _repeat(target, bodies, at_once=2, pause_s=0.05)


@attack
async def endless_headers(target: Target) -> None:
    """Header lines without end, and very many of them, to all three services, without a key."""

    async def go_on(address: str, piece: bytes) -> None:
        while target.running:
            async with _connection(address) as (_, writer):
                writer.write(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ")
                sent = 0
                while target.running and sent < 50_000_000:
                    writer.write(piece)
                    await writer.drain()
                    sent += len(piece)
            await asyncio.sleep(0.05)

    pieces = (b"a" * 65536, b"a\r\nX-B: b" * 5000)
    addresses = (target.server, target.controller, target.worker)
    await asyncio.gather(*(go_on(address, piece) for address in addresses for piece in pieces))


@attack
async def connections_that_never_finish(target: Target) -> None:
    """Half-sent headers, half-sent bodies, and connections that send nothing."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    starts = (
        b"",
        b"POST /v1/chat",
        head,
        head + b"Content-Length: 1000\r\n\r\n{",
        head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    )

    async def stay(address: str, start: bytes) -> None:
        while target.running:
            async with _connection(address) as (reader, writer):
                writer.write(start)
                await writer.drain()
                await _until(target, reader.read(1))
            await asyncio.sleep(0.2)

    addresses = (target.server, target.controller, target.worker)
    await asyncio.gather(*(stay(address, start) for address in addresses for start in starts for _ in range(20)))


@attack
async def clients_that_do_not_read(target: Target) -> None:
    """Streams whose clients never read."""
    body = _chat(stream=True, max_tokens=1500, ignore_eos=True, logprobs=True, top_logprobs=20)
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )

    async def stay() -> None:
        async with _connection(target.server) as (_, writer):
            writer.write(request)
            await writer.drain()
            await asyncio.sleep(max(0.0, target.until - time.monotonic()))

    await asyncio.gather(*(stay() for _ in range(6)))


@attack
async def very_large_bodies(target: Target) -> None:
    """Bodies of 40 to 300 MB, with and without a length, concurrently, to all three services."""

    async def go_on(address: str, path: str, megabytes: int, *, chunked: bool, headers: dict[str, str]) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(megabytes * 4):
                if not target.running:
                    return
                yield b" " * 250_000
                await asyncio.sleep(0)

        async with _session() as http:
            while target.running:
                length = {} if chunked else {"Content-Length": str(megabytes * 1_000_000)}
                try:
                    sent = {"Content-Type": "application/json", **length, **headers}
                    async with http.post(address + path, data=pieces(), headers=sent) as response:
                        await response.read()
                except (aiohttp.ClientError, OSError, TimeoutError):
                    pass
                await asyncio.sleep(0.2)

    generate = "/v1/chat/completions"
    await asyncio.gather(
        *(go_on(target.server, generate, 40, chunked=number % 2 == 0, headers={}) for number in range(12)),
        go_on(target.worker, generate, 300, chunked=True, headers=target.member),
        go_on(target.controller, "/acquire", 300, chunked=True, headers=target.member),
        go_on(target.worker, generate, 300, chunked=False, headers={}),
        go_on(target.controller, "/acquire", 300, chunked=False, headers={}),
    )


@attack
async def compressed_bodies(target: Target) -> None:
    """A few kB that unpack to 200 MB."""
    bomb = gzip.compress(b" " * 200_000_000)
    urls = [address + "/v1/chat/completions" for address in (target.server, target.worker)]
    await _repeat(target, [(url, bomb) for url in urls], at_once=2, pause_s=0.1, **{"Content-Encoding": "gzip"})


@attack
async def thousands_of_connections(target: Target) -> None:
    """As many connections as this process may open, to the API server."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 6000), hard))
    count = min(hard, 6000) - 500

    async def stay(number: int) -> None:
        await asyncio.sleep(number / count)
        async with _connection(target.server) as (reader, _):
            await _until(target, reader.read(1))

    try:
        await asyncio.gather(*(stay(number) for number in range(count)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@attack
async def strangers(target: Target) -> None:
    """Registrations, leases and questions without a key, and from web pages."""
    stand_in = "http://127.0.0.1:9"
    status = {"model_names": [MODEL, "foreign"], "speed": 100.0}
    bodies = [
        (
            target.controller + "/register_worker",
            {"worker_name": stand_in, "check_heart_beat": False, "worker_status": status},
        ),
        (target.controller + "/receive_heart_beat", {"worker_name": stand_in, "queue_length": 0, "status": status}),
        (target.controller + "/deregister_worker", {"worker_name": target.worker}),
        (target.controller + "/report_failure", {"worker_name": target.worker}),
        (target.controller + "/acquire", {"model": MODEL, "lease": "x"}),
        (target.worker + "/v1/chat/completions", {"model": MODEL, "messages": []}),
    ]
    encoded = [(url, json.dumps(body).encode()) for url, body in bodies]
    await asyncio.gather(
        _repeat(target, encoded, at_once=2, pause_s=0.02),
        _repeat(
            target, encoded, at_once=1, pause_s=0.02, **{"Content-Type": "text/plain", "Origin": "http://evil.example"}
        ),
        _repeat(target, encoded, at_once=1, pause_s=0.02, **{**target.member, "Origin": "http://evil.example"}),
        _repeat(target, encoded, at_once=1, pause_s=0.02, **{**target.member, "Host": "evil.example"}),
        _repeat(target, encoded, at_once=1, pause_s=0.02, Authorization="Bearer wrong"),
    )


@attack
async def leases_and_failures_of_a_member(target: Target) -> None:
    """A member floods the controller with leases, and with failures of a worker that serves."""
    numbers = itertools.count()

    async def go_on(http: aiohttp.ClientSession) -> None:
        while target.running:
            lease = f"flood-{next(numbers)}"
            await _post(
                http,
                target.controller + "/acquire",
                json.dumps({"model": "none-such", "lease": lease}).encode(),
                **target.member,
            )
            await _post(
                http,
                target.controller + "/release",
                json.dumps({"leases": [f"{lease}-{i}" for i in range(50)]}).encode(),
                **target.member,
            )
            await asyncio.sleep(0.01)

    async with _session() as http:
        await asyncio.gather(*(go_on(http) for _ in range(2)))


@attack
async def names_that_forge_log_lines(target: Target) -> None:
    name = "x\n2026-01-01 00:00:00 | ERROR | fastserve | all is lost\x1b[2J\u202e"
    bodies = [
        (target.server + "/v1/chat/completions", _chat(model=name)),
        (target.server + "/v1/chat/completions", _chat(model="m" * 1_000_000)),
    ]
    await _repeat(target, bodies, at_once=2, pause_s=0.02)


@attack
async def urgent_requests(target: Target) -> None:
    """Long requests of the highest priority."""
    body = _chat(priority=-100, max_tokens=400, ignore_eos=True)
    await _repeat(target, [(target.server + "/v1/chat/completions", body)], at_once=4, pause_s=0.05)


@attack
async def clients_that_leave(target: Target) -> None:
    """Streams that are opened and left at once."""
    body = _chat(stream=True, max_tokens=1000, ignore_eos=True)

    async def go_on() -> None:
        async with _session() as http:
            while target.running:
                try:
                    async with http.post(
                        target.server + "/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
                    ) as response:
                        await response.content.readany()
                except (aiohttp.ClientError, OSError, TimeoutError):
                    pass
                await asyncio.sleep(0.05)

    await asyncio.gather(*(go_on() for _ in range(4)))


def _sick(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Attack:
    """A member of the cluster that registers as a second worker of the model and answers with `answer`."""

    async def run(target: Target) -> None:
        [port] = free_ports(1)
        address = f"http://127.0.0.1:{port}"
        status = {"model_names": [MODEL], "speed": 1.0, "queue_length": 0, "heartbeat_interval_s": 1.0}
        app = web.Application(client_max_size=2**26)

        async def get_status(_: web.Request) -> web.Response:
            return web.json_response(status)

        app.router.add_post("/worker_get_status", get_status)
        app.router.add_get("/health", get_status)
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        beat = json.dumps({"worker_name": address, "queue_length": 0, "status": status}).encode()
        try:
            async with _session() as http:
                while target.running:
                    await _post(http, target.controller + "/receive_heart_beat", beat, **target.member)
                    await asyncio.sleep(0.5)
                goodbye = json.dumps({"worker_name": address}).encode()
                await _post(http, target.controller + "/deregister_worker", goodbye, **target.member)
        finally:
            await runner.cleanup()

    return run


async def _error_500(_: web.Request) -> web.StreamResponse:
    return web.json_response(
        {"error": {"message": "no", "type": "server_error", "param": None, "code": None}}, status=500
    )


async def _html(_: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>It works</html>", content_type="text/html")


async def _redirect(_: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": "http://127.0.0.1:9/"})


async def _nothing(_: web.Request) -> web.StreamResponse:
    return web.Response(status=204)


async def _bad_text(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b'{"choices": "\xff\xfe', content_type="application/json")


async def _endless_line(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    try:
        await response.write(b"data: ")
        for _ in range(2000):
            await response.write(b"a" * 65536)
    except (OSError, asyncio.CancelledError):
        pass
    return response


for _name, _answer in {
    "a-worker-that-answers-500": _error_500,
    "a-worker-that-answers-html": _html,
    "a-worker-that-redirects": _redirect,
    "a-worker-that-answers-nothing": _nothing,
    "a-worker-with-broken-text": _bad_text,
    "a-worker-with-an-endless-line": _endless_line,
}.items():
    ATTACKS[_name] = _sick(_answer)


@asynccontextmanager
async def _connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A raw connection. A refusal or reset inside the block ends the block."""
    url = urlsplit(address)
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        yield reader, writer
    except OSError:
        await asyncio.sleep(0.1)
    finally:
        if writer is not None:
            writer.transport.abort()


async def _until(target: Target, work: Awaitable[Any]) -> None:
    """Await `work`, but no longer than the attack lasts."""
    with suppress(TimeoutError):
        await asyncio.wait_for(work, max(0.01, target.until - time.monotonic()))


# ---- attackers as processes ---------------------------------------------------------------------------------------


class Attacker:
    """A process that attacks, or burns CPU time, on request. Use it as a context manager."""

    def __init__(self, target: Target) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve_orders, args=(theirs, target), daemon=True)

    def __enter__(self) -> Attacker:
        self._process.start()
        self._connection.recv()  # its imports are done
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    async def attack(self, name: str, seconds: float) -> float:
        """Run an attack. Returns its CPU seconds."""
        return await self._order(name, seconds, 0.0)

    async def burn(self, share: float, seconds: float) -> float:
        """Use this share of one core, without any connection."""
        return await self._order(None, seconds, share)

    async def _order(self, name: str | None, seconds: float, share: float) -> float:
        self._connection.send((name, seconds, share))
        answer = await asyncio.to_thread(self._connection.recv)
        if isinstance(answer, str):
            raise RuntimeError(f"the attack {name} failed: {answer}")
        return float(answer)


def _serve_orders(connection: Connection, target: Target) -> None:
    connection.send("ready")
    while (order := connection.recv()) is not None:
        name, seconds, share = order
        began = time.process_time()
        try:
            if name is None:
                _burn(share, seconds)
            else:
                target.until = time.monotonic() + seconds
                asyncio.run(ATTACKS[name](target))
            connection.send(time.process_time() - began)
        except Exception as error:  # noqa: BLE001 - raised again by the other side
            connection.send(repr(error))


def _burn(share: float, seconds: float) -> None:
    """Use this share of a core, in bursts, like the attacks."""
    until = time.monotonic() + seconds
    while (now := time.monotonic()) < until:
        busy_until = now + BURST_S * share
        while time.monotonic() < busy_until:
            pass
        time.sleep(max(0.0, now + BURST_S - time.monotonic()))


# ---- the table --------------------------------------------------------------------------------------------------


async def attacked(target: Target, attacker: Attacker, name: str, seconds: float) -> tuple[Seen, float, float]:
    """The good clients' results during an attack, the services' growth in MB, and the attacker's CPU seconds."""
    before_mb = target.rss_mb()
    async with good_clients(target) as seen:
        cpu_s = await attacker.attack(name, seconds)
    await asyncio.sleep(0.5)
    return seen, target.rss_mb() - before_mb, cpu_s


async def quiet(target: Target, seconds: float) -> Seen:
    """The good clients' results without an attack."""
    async with good_clients(target) as seen:
        await asyncio.sleep(seconds)
    return seen


async def with_busy_cores(target: Target, attacker: Attacker, share: float, seconds: float) -> Seen:
    async with good_clients(target) as seen:
        await attacker.burn(share, seconds)
    return seen


def _pooled(rounds: list[Seen]) -> Seen:
    return Seen([one for seen in rounds for one in seen.latencies_s], [one for seen in rounds for one in seen.lost])


async def _row(target: Target, name: str, seconds: float, rounds: int) -> str:
    calm: list[Seen] = []
    hit: list[Seen] = []
    busy: list[Seen] = []
    grown_mb, attacker_s, calm_s, hit_s = 0.0, 0.0, 0.0, 0.0
    with Attacker(target) as attacker:
        for _ in range(rounds):
            before_s = target.cpu_s()
            calm.append(await quiet(target, seconds))
            calm_s += target.cpu_s() - before_s
            before_s = target.cpu_s()
            seen, more_mb, cpu_s = await attacked(target, attacker, name, seconds)
            hit_s += target.cpu_s() - before_s
            hit.append(seen)
            grown_mb, attacker_s = grown_mb + more_mb, attacker_s + cpu_s
            busy.append(await with_busy_cores(target, attacker, min(1.0, cpu_s / seconds), seconds))
    all_calm, all_hit, all_busy = _pooled(calm), _pooled(hit), _pooled(busy)
    for problem in all_hit.lost[:2]:
        print(f"lost under {name}: {problem}", file=sys.stderr, flush=True)
    per_round = statistics.median(one.p99_s / before.p99_s for one, before in zip(hit, calm, strict=True))
    return (
        f"| {name} | {len(all_hit.latencies_s)} | {len(all_hit.lost)} | {all_calm.p99_s * 1e3:.0f} "
        f"| {all_hit.p99_s * 1e3:.0f} | {all_busy.p99_s * 1e3:.0f} | {all_hit.p99_s / all_calm.p99_s:.2f} "
        f"| {per_round:.2f} | {all_busy.p99_s / all_calm.p99_s:.2f} | {attacker_s / rounds / seconds:.2f} "
        f"| {(hit_s - calm_s) / rounds / seconds:+.2f} | {grown_mb:+.0f} |"
    )


HEADINGS = (
    *("attack", "good requests", "lost", "p99 quiet, ms", "attacked", "busy cores", "attacked / quiet"),
    *("median of rounds", "busy / quiet", "attacker's cores", "services' cores", "memory, MB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each window")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind")
    parser.add_argument("--only", choices=sorted(ATTACKS), action="append", help="run this attack (repeatable)")
    options = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder, running_trio(Path(folder)) as target:
        asyncio.run(quiet(target, 1.0))  # warm-up
        for name in options.only or ATTACKS:
            print(asyncio.run(_row(target, name, options.seconds, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
