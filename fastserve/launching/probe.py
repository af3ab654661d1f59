"""HTTP requests to our own services on this machine."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import ssl

TIMEOUT_S = 1.0
MAX_ANSWER_BYTES = 1 << 20


class Endpoint(Protocol):
    """Host and port of a service."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def ssl(self) -> bool: ...


class Probe:
    """Sends GET requests to services, over TLS where they serve it."""

    def __init__(self, client_certificate: tuple[str, str] | None, timeout_s: float = TIMEOUT_S) -> None:
        """`client_certificate`: paths of a certificate and its key, for services that require one."""
        self._client_certificate = client_certificate
        self._timeout_s = timeout_s
        self._context: ssl.SSLContext | None = None

    def get(self, service: Endpoint, path: str, headers: Mapping[str, str] | None = None) -> bytes | None:
        """The body of an answer with status 200; None for anything else."""
        try:
            connection = self._connect(service)
        except OSError:
            return None  # the service cannot load this certificate either, and reports it itself
        try:
            connection.request("GET", path, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.read(MAX_ANSWER_BYTES) if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _connect(self, service: Endpoint) -> http.client.HTTPConnection:
        # http.client, not urllib: requests to this machine must not go through a proxy from the environment.
        if not service.ssl:
            return http.client.HTTPConnection(service.host, service.port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(service.host, service.port, timeout=self._timeout_s, context=self._tls())

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            import ssl

            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            # The service is our own child on this machine, so the name in its certificate does not matter.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            if self._client_certificate is not None:
                context.load_cert_chain(*self._client_certificate, password="")
            self._context = context
        return self._context
