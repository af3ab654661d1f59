"""The bounds hold for each of the three services, as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import is_alive
from tests.serving.wire import KNOWN, Service, wait_until

COMMANDS = {
    "controller": ["fastserve.controller"],
    "worker": ["fastserve.model_worker", "--engine", "fake", "--no-register"],
    "api server": ["fastserve.openai_api_server"],
}
POSTS = {"controller": "/acquire", "worker": "/v1/completions", "api server": "/v1/chat/completions"}


def start(command: list[str], log_file: Path, **environ: str) -> Service:
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", "0"],
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        )
    service = Service(process, 0, log_file)

    def serves() -> bool:
        assert process.poll() is None, service.log
        return "Uvicorn running on http://127.0.0.1:" in service.log

    wait_until(serves, "the service listens", 90)
    service.port = int(service.log.partition("Uvicorn running on http://127.0.0.1:")[2].split()[0])
    return service


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    folder = tmp_path_factory.mktemp("services")
    started = {
        name: start(command, folder / name, FASTSERVE_HEAD_TIMEOUT_S="1", FASTSERVE_MAX_BUFFERED_BYTES="9000000")
        for name, command in COMMANDS.items()
    }
    yield started
    for service in started.values():
        service.process.kill()
        service.process.wait()


@pytest.fixture(params=COMMANDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_body_over_the_default_limit_is_refused_with_413(services: dict[str, Service], name: str) -> None:
    limit = 2**20 if name == "controller" else 8 * 2**20
    with services[name].wire() as wire:
        wire.send(f"POST {POSTS[name]} HTTP/1.1\r\n{KNOWN}Content-Length: {limit + 1}\r\n".encode())
        wire.send(b"Content-Type: application/json\r\n\r\n")
        reply = wire.next_reply()
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert str(limit) in reply.error["message"]


def test_a_large_body_within_the_limit_is_read(services: dict[str, Service], name: str) -> None:
    body = json.dumps({"model": "a", "padding": "x" * 900_000}).encode()
    assert services[name].ask(POSTS[name], "POST", body, "Content-Type: application/json\r\n").status not in (413, 500)


def test_bodies_beyond_the_sum_are_refused_with_503(services: dict[str, Service], name: str) -> None:
    size = 1_000_000 if name == "controller" else 8_000_000
    count = 9_000_000 // size
    lines = f"POST {POSTS[name]} HTTP/1.1\r\n{KNOWN}Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    head = lines.encode()
    wires = [services[name].wire() for _ in range(count)]
    for wire in wires:
        wire.send(head + b"x" * (size - 1))

    def is_refused() -> bool:
        with services[name].wire() as wire:
            wire.send(head)
            wire.socket.settimeout(0.3)
            try:
                return b" 503 " in wire.socket.recv(65536)
            except TimeoutError:
                return False

    wait_until(is_refused, "the sum is reached")
    for wire in wires:
        wire.socket.close()


def test_compressed_bodies_are_refused_with_415(services: dict[str, Service], name: str) -> None:
    reply = services[name].ask(
        POSTS[name], "POST", b"xyz", "Content-Encoding: gzip\r\nContent-Type: application/json\r\n"
    )
    assert reply.status == 415


def test_half_a_head_is_answered_with_408(services: dict[str, Service], name: str) -> None:
    with services[name].wire() as wire:
        wire.send(b"POST /v1/comp")
        assert wire.last_reply().status == 408


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/docs", "/openapi.json", "/nothing"])
def test_head_is_answered_as_get_is_without_the_body(services: dict[str, Service], name: str, path: str) -> None:
    status = services[name].ask(path).status
    reply = services[name].ask(path, "HEAD")
    assert (reply.status, reply.body) == (status, b"")


FORGED = "x\nFATAL | all is lost\x1b[2J\u202e\x9b31m\r"


def test_names_from_outside_forge_no_lines_in_logs(services: dict[str, Service], name: str) -> None:
    service = services[name]
    given = {"model": FORGED, "lease": FORGED, "prompt": "a", "messages": [], FORGED: 1, "worker_name": FORGED}
    served = {**given, "model": "fastserve-demo"}
    for path in (POSTS[name], "/report_failure", "/get_worker_address", "/worker_generate", "/%0aFATAL%20|%1b[2J"):
        for body in (given, served):
            headers = "X-Request-Id: \x9b31mred\r\nContent-Type: application/json\r\nUser-Agent: \u202e\r\n"
            assert service.ask(path, "POST", json.dumps(body).encode(), headers).status != 500
    stranger = (
        b"GET /%0aFATAL HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: \x1b[31m\r\nAuthorization: Bearer \x1b[2J\r\n\r\n"
    )
    with service.wire() as wire:
        wire.send(stranger)
        assert wire.next_reply().status in (400, 401, 404)
    lines = service.log.split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("FATAL") for line in lines)


HALF_PAIRS = [b"\\ud800", b"a\\udc00b", b"\\udbff\\u0041"]


def test_half_of_a_surrogate_pair_is_named_by_every_route(services: dict[str, Service], name: str) -> None:
    paths = {
        "controller": ["/acquire", "/get_worker_address", "/worker_generate_stream", "/receive_heart_beat", "/release"],
        "worker": [
            *("/v1/chat/completions", "/v1/completions", "/count_token"),
            *("/worker_generate", "/worker_generate_stream"),
        ],
        "api server": ["/v1/chat/completions", "/v1/completions"],
    }
    for path in paths[name]:
        for half in HALF_PAIRS:
            for body in (
                b'{"model":"%s","prompt":"%s","worker_name":"%s","leases":["%s"],"lease":"%s"}' % ((half,) * 5),
                b'{"model":"fastserve-demo","messages":[{"role":"user","content":"%s"}],"prompt":["%s"]}'
                % (half, half),
            ):
                reply = services[name].ask(path, "POST", body, "Content-Type: application/json\r\n")
                assert reply.status == (200 if path.startswith("/worker_g") and name == "worker" else 400), (path, body)
                assert b"alf of a surrogate pair" in reply.body, (path, reply.body)


def test_no_other_spelling_of_the_open_path_opens_a_route(services: dict[str, Service]) -> None:
    lines = "Host: localhost\r\nX-Original-URL: /health\r\nX-Rewrite-URL: /health\r\nX-HTTP-Method-Override: GET\r\n"
    for target in (
        *("/workers", "//workers", "/workers/", "/health/../workers", "/health%2f..%2fworkers", "/health/workers"),
        *("/health/", "/HEALTH", "/health%00", "/health;/workers", "/%2e/health/../workers", "/workers?/health"),
        *("http://localhost/workers", "http://localhost/health/../workers", "http://localhost@evil/workers"),
    ):
        with services["controller"].wire() as wire:
            wire.send(f"GET {target} HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
            assert wire.last_reply().status in (400, 401), target
    assert services["controller"].ask("/workers").status == 200


@pytest.mark.parametrize(
    ("line", "status"),
    [
        *((f"Origin: {origin}", 403) for origin in ("null", "", "file://", "http://127.0.0.1.evil.example")),
        *((f"Origin: {origin}", 403) for origin in ("http://localhost.evil.example:80", "moz-extension://abc")),
        *((f"Host: {host}", 421) for host in ("evil.example", "localhost@evil.example", "127.0.0.1.nip.io", "")),
        *((f"Host: {host}", 421) for host in ("2130706433", "0x7f.1", "localhost, evil.example", "[::1].evil")),
    ],
)
def test_pages_of_other_sites_are_kept_out_of_every_service(
    services: dict[str, Service], name: str, line: str, status: int
) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", POSTS[name]), ("DELETE", "/nothing")):
        assert services[name].ask(path, method, headers=line + "\r\n").status == status


def test_an_unknown_route_is_named(services: dict[str, Service], name: str) -> None:
    reply = services[name].ask("/v1/images/edits", "POST", b"{}", "Content-Type: application/json\r\n")
    assert reply.status == 404
    assert "'POST /v1/images/edits' is not supported yet." in reply.error["message"]
    assert f"POST {POSTS[name]}" in reply.error["message"]


def test_a_worker_above_its_memory_mark_refuses_requests_but_lives(tmp_path: Path) -> None:
    worker = start(COMMANDS["worker"], tmp_path / "log", FASTSERVE_MEMORY_HIGH_MARK="1000000")
    try:
        body: dict[str, Any] = {"model": "fastserve-demo", "prompt": "hi"}
        headers = "Content-Type: application/json\r\n"
        reply = worker.ask("/v1/completions", "POST", json.dumps(body).encode(), headers)
        assert (reply.status, reply.error["code"]) == (503, "server_overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        assert worker.ask("/health").status == 200
        assert worker.ask("/metrics").status == 200
        assert "refused for want of memory" in worker.log
    finally:
        worker.process.kill()
        worker.process.wait()


@pytest.mark.slow
def test_a_second_signal_leaves_no_engine_behind(tmp_path: Path) -> None:
    command = ["fastserve.model_worker", "--no-register", "--max-total-tokens", "4096", "--speculative-method", "off"]
    worker = start(command, tmp_path / "log")
    try:
        children = psutil.Process(worker.process.pid).children(recursive=True)
        assert children
        body = {"model": "fastserve-demo", "prompt": "a", "stream": True, "max_tokens": 2000, "ignore_eos": True}
        data = json.dumps(body).encode()
        with worker.wire() as wire:
            wire.send(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(data) + data
            )
            wire.read_until(b"data: ", 30)
            worker.process.send_signal(signal.SIGTERM)
            wire.read_until(b"data: ")
            began = time.monotonic()
            worker.process.send_signal(signal.SIGTERM)
            worker.process.wait(10)
            assert time.monotonic() - began < 3
        wait_until(lambda: not any(is_alive(child.pid) for child in children), "the engine has ended too", 15)
    finally:
        worker.process.kill()
        worker.process.wait()


def test_the_end_of_the_api_servers_drain_is_an_error_event_of_its_own(tmp_path: Path) -> None:
    services = []
    try:
        services.append(start(COMMANDS["controller"], tmp_path / "controller"))
        to_controller = ["--controller-address", f"http://127.0.0.1:{services[0].port}"]
        services.append(start(["fastserve.model_worker", "--engine", "fake", *to_controller], tmp_path / "worker"))
        server = start([*COMMANDS["api server"], *to_controller, "--drain-timeout-s", "0.5"], tmp_path / "server")
        services.append(server)
        wait_until(lambda: server.ask("/ready").status == 200, "the model is known", 30)
        body = {"model": "fastserve-demo", "prompt": "a", "stream": True, "max_tokens": 2000, "ignore_eos": True}
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with server.wire() as wire:
            wire.send(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            begun = wire.read_until(b"data: ", 30)
            server.process.send_signal(signal.SIGTERM)
            answer = begun + wire.read_to_end()
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        event = answer.split(b"data: ")[-2].partition(b"\n\n")[0]
        assert json.loads(event)["error"]["code"] == "server_shutting_down"
        assert server.process.wait(5) == 0
        assert "Traceback" not in server.log
    finally:
        for service in services:
            service.process.kill()
            service.process.wait()
