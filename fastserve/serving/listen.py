"""Listening sockets, and the addresses under which others reach them."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from fastserve.errors import StartupError
from fastserve.observability.text import printable

WILDCARDS_OF_BOTH = ("::", "")
"""Hosts that stand for all IPv4 and IPv6 addresses of the machine."""
WILDCARDS = ("0.0.0.0", *WILDCARDS_OF_BOTH)
MAX_SEND_BUFFER_BYTES = 128 * 1024
"""Send buffer of the kernel for each connection (Linux doubles it), in addition to the process's own buffer. By default
it grows to megabytes, and a client that reads slowly but steadily would look stalled."""
_PORT_ATTEMPTS = 8
_MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


class _BindError(Exception):
    def __init__(self, problem: str, errno: int | None = None) -> None:
        """`problem`: the reason, worded as the end of a sentence."""
        super().__init__(problem)
        self.problem = problem
        self.errno = errno


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind (not listen on) every address that `host` resolves to, except those of families that the machine lacks.

    `::` and an empty host stand for all IPv4 and IPv6 addresses. With port 0, all addresses share one port. Raises
    StartupError if the port is in use or no address can be bound.
    """
    attempts = _PORT_ATTEMPTS if port == 0 else 1
    while True:
        attempts -= 1
        try:
            return _bind_all(host, port)
        except _BindError as error:
            # The port that the system chose for the first address may be in use on another one.
            if error.errno == errno.EADDRINUSE and attempts:
                continue
            if error.errno == errno.EADDRINUSE:
                raise StartupError(
                    f"Port {port} on {printable(host)} is in use by another program: stop it, or choose another port "
                    "with --port."
                ) from error
            raise StartupError(f"Cannot listen on {printable(host)}:{port}: {error.problem}.") from error


def port_problem(host: str, port: int) -> str | None:
    """Why a service could not listen there, or None. Binds as `bind` does, and closes the sockets."""
    try:
        sockets = _bind_all(host, port)
    except _BindError as error:
        return error.problem
    for sock in sockets:
        sock.close()
    return None


def _bind_all(host: str, port: int) -> list[socket.socket]:
    """Bind all addresses. Raises _BindError, with nothing left bound."""
    sockets: list[socket.socket] = []
    try:
        for family, address in _resolve(host, port):
            try:
                sock = _open(family, (address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in _MISSING:
                    problem = (
                        "the port is in use by another program"
                        if error.errno == errno.EADDRINUSE
                        else str(error.strerror)
                    )
                    raise _BindError(problem, error.errno) from error
                continue
            sockets.append(sock)
            port = sock.getsockname()[1]
        if not sockets:
            raise _BindError(f"this machine has no address {printable(host)}")
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Family and socket address of each address that `host` resolves to, IPv4 first."""
    if host in WILDCARDS_OF_BOTH:
        return [(socket.AF_INET, ("0.0.0.0", port)), (socket.AF_INET6, ("::", port, 0, 0))]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _BindError(f"the host name {printable(host)} cannot be resolved ({reason})") from error
    rows = sorted({(family, address) for family, _, _, _, address in found}, key=lambda row: row[0] != socket.AF_INET)
    return list(rows)


def _open(family: socket.AddressFamily, address: Any) -> socket.socket:
    # With an explicit protocol number, asyncio sets TCP_NODELAY. Otherwise each answer, which is written in two parts,
    # would wait 40 ms for the client's acknowledgement of the first.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # IPv4 has its own socket, so that its clients have plain IPv4 addresses.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_SEND_BUFFER_BYTES)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def advertised_address(host: str, port: int, *, ssl: bool = False) -> str:
    """The URL under which others reach a server that listens on `host`; a wildcard becomes this machine's address."""
    if host in WILDCARDS_OF_BOTH:
        host = _own_address(socket.AF_INET) or _own_address(socket.AF_INET6) or _loopback()
    elif host == "0.0.0.0":
        host = _own_address(socket.AF_INET) or "127.0.0.1"
    return url_of(host, port, ssl=ssl)


def local_host(host: str) -> str:
    """The host under which this machine reaches a server that listens on `host`."""
    if host in WILDCARDS_OF_BOTH:
        return _loopback()
    return "127.0.0.1" if host == "0.0.0.0" else host


def url_of(host: str, port: int, *, ssl: bool = False) -> str:
    """URL of `host` unchanged, with brackets around an IPv6 address."""
    return f"{'https' if ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _own_address(family: socket.AddressFamily) -> str | None:
    """This machine's address on the default route, or None without one."""
    # Connecting a datagram socket sends nothing, it only selects a route. The targets are reserved for documentation.
    target: Any = ("192.0.2.1", 9) if family == socket.AF_INET else ("2001:db8::1", 9, 0, 0)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(target)
            return str(sock.getsockname()[0])
    except OSError:
        return None


def _loopback() -> str:
    try:
        _open(socket.AF_INET, ("127.0.0.1", 0)).close()
    except OSError:
        return "::1"
    return "127.0.0.1"
