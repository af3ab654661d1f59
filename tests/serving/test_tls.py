"""TLS: wrong files end the start with an error, and a cluster of all services runs with client certificates."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme

from fastserve.config import ApiServerConfig, ControllerConfig, ServerConfig, WorkerConfig
from fastserve.errors import StartupError
from fastserve.serving.handshakes import HandshakeAcceptor
from fastserve.serving.tls import check_tls, server_ssl_context
from tests.keys import CLUSTER
from tests.processes import free_ports
from tests.serving.wire import wait_until


@dataclass(frozen=True)
class Certificates:
    ca: str
    cert: str
    key: str
    foreign_ca: str
    foreign_cert: str
    foreign_key: str
    encrypted_key: str
    nonsense: str

    def client(self, *, cert: bool = True, foreign: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        if foreign:
            context.load_cert_chain(self.foreign_cert, self.foreign_key)
        elif cert:
            context.load_cert_chain(self.cert, self.key)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    paths: dict[str, str] = {}

    def save(name: str, *blobs: trustme.Blob) -> None:
        paths[name] = str(folder / f"{name}.pem")
        Path(paths[name]).write_bytes(b"".join(blob.bytes() for blob in blobs))

    for prefix in ("", "foreign_"):
        authority = trustme.CA()
        pair = authority.issue_cert("127.0.0.1", "localhost")
        save(f"{prefix}ca", authority.cert_pem)
        save(f"{prefix}cert", *pair.cert_chain_pems)
        save(f"{prefix}key", pair.private_key_pem)
    for name, content in (
        ("encrypted_key", _encrypted(Path(paths["key"]).read_bytes())),
        ("nonsense", b"no certificate"),
    ):
        paths[name] = str(folder / name)
        Path(paths[name]).write_bytes(content)
    return Certificates(**paths)


def _encrypted(key: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization

    encryption = serialization.BestAvailableEncryption(b"secret")
    form = serialization.PrivateFormat.PKCS8
    loaded = serialization.load_pem_private_key(key, None)
    return loaded.private_bytes(serialization.Encoding.PEM, form, encryption)


# ---- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["cert=missing.pem", "key"], "--tls-cert missing.pem cannot be read: No such file"),
        (["cert", "key=missing.pem"], "--tls-key missing.pem cannot be read: No such file"),
        (["cert", "key", "ca=missing.pem"], "--tls-ca missing.pem cannot be read: No such file"),
        (["cert=nonsense", "key"], "holds no certificate in PEM format"),
        (["cert", "key=nonsense"], "holds no private key in PEM format"),
        (["cert", "key", "ca=nonsense"], "holds no certificate in PEM format"),
        (["cert", "key=foreign_key"], "is not that of the certificate"),
        (["cert", "key=encrypted_key"], "without a passphrase"),
        (["cert"], "--tls-key is missing"),
        (["key"], "--tls-cert is missing"),
        (["cert", "key", "client_cert_required=True"], "--tls-client-cert-required needs --tls-ca"),
        (["client_cert_required=True"], "--tls-client-cert-required needs --tls-cert"),
    ],
)
def test_a_wrong_file_for_tls_is_one_sentence_that_names_it(
    certificates: Certificates, flags: list[str], words: str
) -> None:
    settings: dict[str, Any] = {}
    for flag in flags:
        name, _, value = flag.partition("=")
        settings["tls_" + name] = getattr(certificates, value or name, value)
    with pytest.raises(StartupError) as caught:
        check_tls(ServerConfig(**settings))
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "SSL_CERTFILE"),
        ({"SSL_CERTFILE": "missing.pem"}, "SSL_KEYFILE"),
        ({"SSL_CERTFILE": "missing.pem", "SSL_KEYFILE": "other.pem"}, "SSL_CERTFILE missing.pem cannot be read"),
    ],
)
def test_fastchats_flag_and_variables_are_checked_alike(environ: dict[str, str], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        server_ssl_context(ServerConfig(ssl=True), environ)


def test_a_service_with_a_wrong_file_ends_with_that_sentence_alone(tmp_path: Path) -> None:
    environ = {**os.environ, "SSL_CERTFILE": str(tmp_path / "none.pem"), "SSL_KEYFILE": str(tmp_path / "none.pem")}
    command = [sys.executable, "-m", "fastserve.controller", "--port", "0", "--ssl"]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "none.pem cannot be read: No such file or directory." in run.stderr
    assert "Traceback" not in run.stderr


def test_who_must_show_a_certificate(certificates: Certificates) -> None:
    files: dict[str, Any] = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_ca": certificates.ca}

    def mode(config: ServerConfig) -> ssl.VerifyMode:
        context = server_ssl_context(config)
        assert context is not None
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
        return context.verify_mode

    assert mode(ControllerConfig(**files)) is ssl.CERT_REQUIRED
    assert mode(WorkerConfig(**files)) is ssl.CERT_REQUIRED
    assert mode(WorkerConfig(no_register=True, **files)) is ssl.CERT_OPTIONAL
    assert mode(ApiServerConfig(**files)) is ssl.CERT_OPTIONAL
    assert mode(ApiServerConfig(tls_client_cert_required=True, **files)) is ssl.CERT_REQUIRED


# ---- the trio ---------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    controller: str
    worker: str
    server: str
    folder: Path

    def ask(self, url: str, context: ssl.SSLContext, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"content-type": "application/json", **CLUSTER})
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return json.loads(response.read())


@pytest.fixture(scope="module")
def cluster(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("tls")
    ports = free_ports(3)
    controller, worker, server = (f"https://127.0.0.1:{port}" for port in ports)
    tls = ["--tls-cert", certificates.cert, "--tls-key", certificates.key, "--tls-ca", certificates.ca]
    to_controller = ["--controller-address", controller]
    commands = {
        "controller": [],
        "model_worker": [*to_controller, "--engine", "fake"],
        "openai_api_server": to_controller,
    }
    processes = []
    for (module, flags), port in zip(commands.items(), ports, strict=True):
        command = [sys.executable, "-m", f"fastserve.{module}", "--host", "127.0.0.1", "--port", str(port)]
        with (folder / f"{module}.log").open("w") as log:
            processes.append(subprocess.Popen([*command, *tls, *flags], stderr=log))
    trio = Cluster(controller, worker, server, folder)

    def is_ready() -> bool:
        try:
            return bool(trio.ask(f"{server}/v1/models", certificates.client())["data"])
        except OSError:
            return False

    try:
        wait_until(is_ready, "a model is served over TLS", 60)
        yield trio
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_cluster_answers_over_tls_with_client_certificates(cluster: Cluster, certificates: Certificates) -> None:
    body = {"model": "fastserve-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = cluster.ask(f"{cluster.server}/v1/chat/completions", certificates.client(), body)
    assert answer["choices"][0]["message"]["content"]
    # Clients of the API server need no certificate of their own.
    answer = cluster.ask(f"{cluster.server}/v1/chat/completions", certificates.client(cert=False), body)
    assert answer["usage"]["completion_tokens"] > 0
    # The controller calls the worker, which requires a certificate too.
    assert cluster.ask(f"{cluster.controller}/refresh_all_workers", certificates.client(), {}) is None
    table = cluster.ask(f"{cluster.controller}/workers", certificates.client())
    assert [row["address"] for row in table["workers"]] == [cluster.worker]


@pytest.mark.parametrize("service", ["controller", "worker", "server"])
def test_the_health_check_of_a_container_asks_over_tls_with_the_services_certificate(
    cluster: Cluster, certificates: Certificates, service: str
) -> None:
    path = Path(__file__).parents[2] / "docker" / "healthcheck.py"
    spec = importlib.util.spec_from_file_location("healthcheck", path)
    assert spec is not None
    assert spec.loader is not None
    healthcheck = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = healthcheck  # dataclasses need it there
    spec.loader.exec_module(healthcheck)
    port = str(urlsplit(getattr(cluster, service)).port)
    module = {"controller": "controller", "worker": "model_worker", "server": "openai_api_server"}[service]
    command = ["python", "-m", f"fastserve.{module}", "--host=0.0.0.0", "--port", port]
    tls = ["--tls-cert", certificates.cert, "--tls-key", certificates.key, "--tls-ca", certificates.ca]
    others = [["docker-init", "--", "sh"], [], ["python", "-m", "fastserve.engine.process"]]
    found = healthcheck.find_service([*others, [*command, *tls]], {})
    assert found is not None
    assert healthcheck.is_healthy(found)
    in_plain = healthcheck.find_service([command], {})
    assert in_plain is not None
    assert not healthcheck.is_healthy(in_plain)
    assert healthcheck.find_service(others, {}) is None


@pytest.mark.parametrize("service", ["controller", "worker"])
@pytest.mark.parametrize("stranger", [{"cert": False}, {"foreign": True}])
def test_within_the_cluster_nobody_is_served_without_its_certificate(
    cluster: Cluster, certificates: Certificates, service: str, stranger: dict[str, bool]
) -> None:
    url = getattr(cluster, service) + "/health"
    assert cluster.ask(url, certificates.client())["status"] in ("ok", "ready")
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        cluster.ask(url, certificates.client(**stranger))


def test_a_handshake_that_does_not_end_is_closed_and_plain_http_is_not_answered(
    certificates: Certificates, start_service: Callable[..., Any]
) -> None:
    service = start_service(
        "--tls-cert", certificates.cert, "--tls-key", certificates.key, "--head-timeout-s", "1"
    )  # fmt: skip
    with service.wire() as silent, service.wire() as plain:
        plain.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" not in plain.read_to_end()
        assert silent.is_closed(5)
    context = certificates.client(cert=False)
    with socket.create_connection(("127.0.0.1", service.port)) as raw, context.wrap_socket(
        raw, server_hostname="localhost"
    ) as wire:  # fmt: skip
        wire.sendall(b"GET /he")
        assert b" 408 " in wire.recv(65536)


def test_handshakes_under_way_are_bounded_in_number_and_room_is_found_again(
    certificates: Certificates, start_service: Callable[..., Any]
) -> None:
    tls = ["--tls-cert", certificates.cert, "--tls-key", certificates.key]
    service = start_service(*tls, "--max-handshakes", "4", "--head-timeout-s", "2")
    context = certificates.client(cert=False)

    def status(timeout_s: float = 5) -> bytes:
        with socket.create_connection(("127.0.0.1", service.port), timeout_s) as raw, context.wrap_socket(
            raw, server_hostname="localhost"
        ) as wire:  # fmt: skip
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return wire.recv(65536).split(b" ")[1]

    assert status() == b"200"
    held = [service.wire() for _ in range(4)]
    wait_until(lambda: service.num_connections() == 4, "all are accepted")
    with service.wire() as fifth:
        assert fifth.is_closed(1)
    # Failed handshakes end at once and make room for others.
    held[0].send(b"GET / HTTP/1.1\r\n\r\n")
    held[0].read_to_end()
    assert status() == b"200"
    # The others end at their timeout.
    assert all(wire.is_closed(5) for wire in held[1:])
    assert [status() for _ in range(5)] == [b"200"] * 5
    assert "4 TLS handshakes are under way" in service.log
    for wire in held:
        wire.socket.close()


async def test_one_address_does_not_take_all_handshakes(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address of this machine may, as it can stand for many clients."""
    monkeypatch.setattr("fastserve.serving.handshakes.client_address", lambda peer, _: addresses.get(peer[1]))
    context = server_ssl_context(ServerConfig(tls_cert=certificates.cert, tls_key=certificates.key))
    assert context is not None
    acceptor = HandshakeAcceptor(asyncio.Protocol, context, max_handshakes=4, timeout_s=30)
    listening = socket.create_server(("127.0.0.1", 0))
    acceptor.listen(listening, 16)
    addresses: dict[int, str | None] = {}
    held: list[socket.socket] = []

    async def is_kept(address: str | None) -> bool:
        """Whether a connection from `address` is not closed at once."""
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        addresses[sock.getsockname()[1]] = address
        held.append(sock)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, listening.getsockname())
        try:
            async with asyncio.timeout(0.3):
                return await loop.sock_recv(sock, 1) != b""
        except TimeoutError:
            return True
        except ConnectionResetError:
            return False

    try:
        assert [await is_kept("192.0.2.1") for _ in range(3)] == [True, True, False]
        assert [await is_kept("192.0.2.2"), await is_kept(None)] == [True, True]
        assert not await is_kept("192.0.2.3")
    finally:
        await acceptor.close()
        listening.close()
        for sock in held:
            sock.close()
