"""For programs beside the services: finds the workers of a model, and calls them with an administrator's rights."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from fastserve.access.admin import ENV_ADMIN_KEY
from fastserve.access.cluster_key import load_cluster_keys
from fastserve.access.key_files import read_lines
from fastserve.errors import StartupError
from fastserve.protocol import RoutingTable

CONNECT_TIMEOUT_S = 10.0
MAX_SHOWN_CHARS = 1000


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
        return self.status == httpx.codes.OK


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
        self.address = _checked(address)
        if key is None:
            key = _find_key(environ, urlsplit(self.address).hostname or "", admin_key_file, cluster_key_file)
        verify: ssl.SSLContext | bool = True
        if ca_file is not None:
            try:
                verify = ssl.create_default_context(cafile=ca_file)
            except (OSError, ssl.SSLError) as error:
                raise StartupError(f"The certificates in {ca_file} cannot be read: {error}.") from error
        self._client = httpx.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            verify=verify,
            trust_env=False,  # services of a cluster are not called through a proxy
            timeout=httpx.Timeout(CONNECT_TIMEOUT_S),
        )

    def __enter__(self) -> ClusterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def workers_of(self, model: str) -> list[str]:
        """Addresses of the workers that serve the model, by the controller's table. Raises StartupError if there are
        none, or the controller does not answer."""
        url = f"{self.address}/workers"
        try:
            response = self._client.get(url)
            response.raise_for_status()
            table = RoutingTable.model_validate_json(response.content)
        except httpx.HTTPStatusError as error:
            raise StartupError(f"{url}: {_message(error.response)}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise StartupError(f"{url} did not answer as a controller does: {error}") from error
        found = [entry.address for entry in table.workers if model in entry.status.model_names]
        if not found:
            served = sorted({name for entry in table.workers for name in entry.status.model_names})
            raise StartupError(f"No worker serves {model!r} now. Served: {', '.join(served) or 'nothing'}.")
        return found

    def call(self, worker: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Outcome:
        """Call a worker: POST with a body, GET without one. Never raises for what the worker or the network does."""
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        url = worker.rstrip("/") + path
        try:
            if body is None:
                response = self._client.get(url, timeout=timeout)
            else:
                response = self._client.post(url, json=dict(body), timeout=timeout)
        except httpx.HTTPError as error:
            return Outcome(worker, 0, {}, f"It did not answer: {error or type(error).__name__}.")
        try:
            reply = response.json()
        except ValueError:
            reply = None
        fields = reply if isinstance(reply, dict) else {}
        message = str(fields.get("message", "")) if response.status_code == httpx.codes.OK else _message(response)
        return Outcome(worker, response.status_code, fields, message)


def _checked(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StartupError(f"Invalid address {address!r}: give it as http://HOST:PORT.")
    return address.rstrip("/")


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


def _message(response: httpx.Response) -> str:
    """The message of an error body, else the body."""
    try:
        return str(response.json()["error"]["message"])[:MAX_SHOWN_CHARS]
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}: {response.text[:MAX_SHOWN_CHARS]}"
