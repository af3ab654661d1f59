"""Questions to services of our own on this machine."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import ssl

TIMEOUT_S = 1.0
MAX_ANSWER_BYTES = 1 << 20


class Endpoint(Protocol):
    """Where a service answers."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def ssl(self) -> bool: ...


class Probe:
    """Asks services over HTTP, or over TLS where they serve that."""

    def __init__(self, client_certificate: tuple[str, str] | None, timeout_s: float = TIMEOUT_S) -> None:
        """`client_certificate`: files of a certificate and its key, for services that ask their callers for one."""
        self._client_certificate = client_certificate
        self._timeout_s = timeout_s
        self._context: ssl.SSLContext | None = None

    def get(self, service: Endpoint, path: str, headers: Mapping[str, str] | None = None) -> bytes | None:
        """The body that a service answers with status 200; None for anything else."""
        try:
            connection = self._connect(service)
        except OSError:
            return None  # a certificate that the service itself will not accept either, and say so
        try:
            connection.request("GET", path, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.read(MAX_ANSWER_BYTES) if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _connect(self, service: Endpoint) -> http.client.HTTPConnection:
        # http.client and not urllib: a proxy in the environment must not stand between us and our own machine.
        if not service.ssl:
            return http.client.HTTPConnection(service.host, service.port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(service.host, service.port, timeout=self._timeout_s, context=self._tls())

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            import ssl

            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            # The service is our own child on this machine, under whatever name its certificate has.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            if self._client_certificate is not None:
                context.load_cert_chain(*self._client_certificate, password="")
            self._context = context
        return self._context
