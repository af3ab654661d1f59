"""For programs beside the services: finds the workers of a model, and calls them with an administrator's rights."""

from __future__ import annotations

import http.client
import json
import os
import selectors
import socket
import ssl
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from fastserve.access.addresses import WorkerAddress, parse_worker_address
from fastserve.access.admin import ENV_ADMIN_KEY
from fastserve.access.cluster_key import load_cluster_keys
from fastserve.access.key_files import read_lines
from fastserve.errors import InvalidRequestError, StartupError
from fastserve.protocol import RoutingTable

CONNECT_TIMEOUT_S = 10.0
MAX_SHOWN_CHARS = 1000
MAX_ANSWER_BYTES = 1 << 26
"""The table of workers is the longest answer."""


@dataclass(frozen=True)
class Outcome:
    """A worker's answer to a call."""

    address: str
    status: int
    """HTTP status; 0: it was not reached."""
    reply: dict[str, Any]
    message: str

    @property
    def is_success(self) -> bool:
        return self.status == HTTPStatus.OK


class ClusterClient:
    """A controller or a worker, and the keys to call it. Closed by `close`, or as a context manager."""

    def __init__(
        self,
        address: str,
        *,
        key: str | None = None,
        admin_key_file: str | None = None,
        cluster_key_file: str | None = None,
        ca_file: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """`key`: what to send to services; None: the admin key of the file or of FASTSERVE_ADMIN_KEY, else the cluster
        key, which is found as the services find it. `ca_file`: the authority that signed the services' certificates.
        Raises StartupError for an address or a key that cannot be used."""
        parsed = service_address(address)
        self.address = str(parsed)
        if key is None:
            key = _find_key(environ, parsed.host, admin_key_file, cluster_key_file)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise StartupError("The key has characters that no HTTP header may have.")
        try:
            self._tls = ssl.create_default_context(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise StartupError(f"The certificates in {ca_file} cannot be read: {error}.") from error
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = defaultdict(list)
        """Open connections by scheme and host; a call takes one away, so that threads share none."""
        self._lock = threading.Lock()

    def __enter__(self) -> ClusterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            connections = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in connections:
            connection.close()

    def workers_of(self, model: str) -> list[str]:
        """Addresses of the workers that serve the model, by the controller's table. Raises StartupError if there are
        none, or the controller does not answer."""
        url = f"{self.address}/workers"
        try:
            status, content = self._request(url, None, CONNECT_TIMEOUT_S)
            if status != HTTPStatus.OK:
                raise StartupError(f"{url}: {_message(status, content)}")
            table = RoutingTable.model_validate_json(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise StartupError(f"{url} did not answer as a controller does: {error}") from error
        found = [entry.address for entry in table.workers if model in entry.status.model_names]
        if not found:
            served = sorted({name for entry in table.workers for name in entry.status.model_names})
            raise StartupError(f"No worker serves {model!r} now. Served: {', '.join(served) or 'nothing'}.")
        return found

    def call(self, worker: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Outcome:
        """Call a worker: POST with a body, GET without one. Never raises for what the worker or the network does."""
        try:
            status, content = self._request(worker.rstrip("/") + path, body, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            return Outcome(worker, 0, {}, f"It did not answer: {error or type(error).__name__}.")
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            reply = None
        fields = reply if isinstance(reply, dict) else {}
        message = str(fields.get("message", "")) if status == HTTPStatus.OK else _message(status, content)
        return Outcome(worker, status, fields, message)

    def _request(self, url: str, body: Mapping[str, Any] | None, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of the answer. Proxies are not used. The connection is kept: making one takes as long as a
        small weight update. Raises OSError or HTTPException."""
        parts = urlsplit(url)
        connection = self._connect(parts.scheme, parts.netloc)
        try:
            assert connection.sock is not None
            connection.sock.settimeout(timeout_s)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            if body is None:
                connection.request("GET", target, headers=self._headers)
            else:
                headers = self._headers | {"Content-Type": "application/json"}
                connection.request("POST", target, json.dumps(dict(body)).encode(), headers)
            response = connection.getresponse()
            status, content = response.status, response.read(MAX_ANSWER_BYTES + 1)
            if len(content) > MAX_ANSWER_BYTES:
                raise http.client.HTTPException(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
        except BaseException:
            connection.close()
            raise
        if connection.sock is not None:  # the service has not closed it
            with self._lock:
                self._idle[parts.scheme, parts.netloc].append(connection)
        return status, content

    def _connect(self, scheme: str, host: str) -> http.client.HTTPConnection:
        """A connection that no other call uses."""
        while True:
            with self._lock:
                idle = self._idle[scheme, host]
                connection = idle.pop() if idle else None
            if connection is None:
                break
            if connection.sock is not None and not _is_readable(connection.sock):
                return connection
            connection.close()  # the service has closed it meanwhile, or sent what nobody asked for
        if scheme == "https":
            connection = http.client.HTTPSConnection(host, timeout=CONNECT_TIMEOUT_S, context=self._tls)
        else:
            connection = http.client.HTTPConnection(host, timeout=CONNECT_TIMEOUT_S)
        connection.connect()
        return connection


def _is_readable(connection: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))


def service_address(address: str) -> WorkerAddress:
    """Raises StartupError for anything but `http(s)://HOST:PORT`."""
    try:
        return parse_worker_address(address, "address")
    except InvalidRequestError as error:
        raise StartupError(error.message) from error


def _find_key(
    environ: Mapping[str, str], host: str, admin_key_file: str | None, cluster_key_file: str | None
) -> str | None:
    if admin_key_file is not None:
        lines = [line.strip() for line in read_lines(admin_key_file, "--admin-key-file") if line.strip()]
        if not lines:
            raise StartupError(f"--admin-key-file {admin_key_file} holds no key.")
        return lines[0]
    given = environ.get(ENV_ADMIN_KEY, "").split(",")[0].strip()
    if given:
        return given
    keys = load_cluster_keys(environ, key_file=cluster_key_file, insecure=False, hosts=[host])
    return None if keys is None else keys.current


def _message(status: int, content: bytes) -> str:
    """The message of an error body, else the body."""
    try:
        return str(json.loads(content)["error"]["message"])[:MAX_SHOWN_CHARS]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"status {status}: {content.decode(errors='replace')[:MAX_SHOWN_CHARS]}"
