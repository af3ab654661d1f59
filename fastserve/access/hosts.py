"""Names and addresses of hosts: which are loopback, and which `Host` headers and origins a service answers to.

A page of a foreign site reaches services on loopback through its visitor's browser. It cannot choose the `Host` header,
which names the site even after DNS rebinding, so a service that accepts only its own names is safe. A page's `Origin`
header names the site it came from.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import Scope

from fastserve.errors import StartupError
from fastserve.observability.text import printable

_HOST_HEADER = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]/@?#\s]+)(?::\d{1,5})?")
_HOST_NAME = re.compile(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_MAX_HEADER_CHARS = 300
_MAX_REMEMBERED = 64
_PROXY_HEADERS = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"})
"""Headers that proxies add. Clients can forge their values, so only their presence is used."""
_CONTAINER_HOSTS = frozenset({"host.docker.internal", "host.containers.internal"})
"""Names under which containers reach this machine. No web site has such a name."""
LOOPBACK_ORIGINS = r"https?://(localhost|[a-z0-9-]+\.localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?"
"""Regular expression for the origins of pages that this machine's own servers serve."""


def is_loopback(host: str) -> bool:
    """Whether a host as users write it (`localhost`, `127.0.0.1`, `::1`, `[::1]`) is the loopback interface.

    Names other than localhost are not resolved and count as reachable from outside.
    """
    host = host.strip("[]").lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def is_of_this_machine(scope: Scope) -> bool:
    """Whether a request comes from this machine directly, and not through a proxy on it."""
    client = scope.get("client")
    if client is None or not is_loopback(client[0]):
        return False
    return not any(name in _PROXY_HEADERS for name, _ in scope["headers"])


def host_of(url: str) -> str:
    """Host of a URL, or "" if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class HostCheck:
    """Accepted `Host` headers of a service: IP addresses, localhost, this machine's names, and `names`.

    A name `.example.com` stands for every host below example.com, and `*` for every host.
    """

    def __init__(self, names: Iterable[str]) -> None:
        own = socket.gethostname().lower()
        label = own.partition(".")[0]
        self._names = {name.lower().strip("[]").rstrip(".") for name in names if name} | _CONTAINER_HOSTS
        self._names |= {own, label, f"{label}.local"}
        self._suffixes = tuple(name for name in self._names if name.startswith("."))
        self._remembered: set[bytes] = set()

    def allows(self, header: bytes | None) -> bool:
        """Whether to accept a request with this `Host` header; one without (None) cannot come from a browser."""
        if header is None or header in self._remembered or "*" in self._names:
            return True
        if len(header) > _MAX_HEADER_CHARS or not self._is_known(header.decode("latin-1")):
            return False
        if len(self._remembered) < _MAX_REMEMBERED:
            self._remembered.add(header)
        return True

    def _is_known(self, text: str) -> bool:
        match = _HOST_HEADER.fullmatch(text)
        if match is None:
            return False
        host = match["host"].strip("[]").lower().rstrip(".")
        if is_loopback(host) or host in self._names or host.endswith(self._suffixes):
            return True
        return _is_ip_address(host)


def check_host_names(names: Iterable[str], flag: str) -> None:
    """Raises StartupError for entries that would match nothing: URLs, names with a port."""
    for name in names:
        if name != "*" and not (_HOST_NAME.fullmatch(name) or _is_ip_address(name)):
            raise StartupError(
                f"{flag}: {printable(name, 80)!r} is no name of a host: write it without scheme, port and path, such "
                "as api.example.com, .example.com or *."
            )


def is_own_origin(origin: bytes, host: bytes | None) -> bool:
    """Whether a page came from a server on this machine's loopback, or from the server that it calls now."""
    text = origin.decode("latin-1").lower()
    if len(text) > _MAX_HEADER_CHARS:
        return False
    if re.fullmatch(LOOPBACK_ORIGINS, text):
        return True
    return host is not None and text.partition("://")[2].encode("latin-1") == host.lower()
