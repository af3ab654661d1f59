"""Listening sockets, and the address under which others reach them."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from fastserve.errors import StartupError
from fastserve.observability.text import printable

WILDCARDS_OF_BOTH = ("::", "")
"""Hosts that mean every address of the machine, of IPv4 and IPv6."""
WILDCARDS = ("0.0.0.0", *WILDCARDS_OF_BOTH)
MAX_SEND_BUFFER_BYTES = 128 * 1024
"""What the kernel holds for a client that reads slowly (Linux doubles it), beside what the process buffers. Left alone
it grows to megabytes for each connection, and a client that reads slowly but steadily would look stalled meanwhile."""
_PORT_ATTEMPTS = 8
_MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


class _BindError(Exception):
    def __init__(self, problem: str, errno: int | None = None) -> None:
        """`problem`: words that end a sentence."""
        super().__init__(problem)
        self.problem = problem
        self.errno = errno


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind (not listen) every address that `host` resolves to; families that the machine lacks are passed over.

    `::` and an empty host are every address of IPv4 and of IPv6. Raises StartupError when the port is taken or no
    address can be bound. With port 0, all addresses share one port.
    """
    attempts = _PORT_ATTEMPTS if port == 0 else 1
    while True:
        attempts -= 1
        try:
            return _bind_all(host, port)
        except _BindError as error:
            # The port that the system chose for the first address may be in use on the second.
            if error.errno == errno.EADDRINUSE and attempts:
                continue
            if error.errno == errno.EADDRINUSE:
                raise StartupError(
                    f"Port {port} on {printable(host)} is in use by another program: stop it, or choose another port "
                    "with --port."
                ) from error
            raise StartupError(f"Cannot listen on {printable(host)}:{port}: {error.problem}.") from error


def port_problem(host: str, port: int) -> str | None:
    """Why a service could not listen there, or None. Binds as `bind` does, and lets go at once."""
    try:
        sockets = _bind_all(host, port)
    except _BindError as error:
        return error.problem
    for sock in sockets:
        sock.close()
    return None


def _bind_all(host: str, port: int) -> list[socket.socket]:
    """Raises _BindError; nothing stays bound then."""
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
    """Family and socket address of each address that `host` stands for, IPv4 first."""
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
    # With the protocol named, asyncio sends what it is given at once (TCP_NODELAY). Else each answer, which is written
    # in two pieces, would wait 40 ms for the client's acknowledgement of the first.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # IPv4 has a socket of its own, so that its clients have plain IPv4 addresses.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_SEND_BUFFER_BYTES)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def advertised_address(host: str, port: int, *, ssl: bool = False) -> str:
    """The address under which others reach a server that listens on `host`; a wildcard becomes the machine's own."""
    if host in WILDCARDS_OF_BOTH:
        host = _own_address(socket.AF_INET) or _own_address(socket.AF_INET6) or _loopback()
    elif host == "0.0.0.0":
        host = _own_address(socket.AF_INET) or "127.0.0.1"
    return url_of(host, port, ssl=ssl)


def local_host(host: str) -> str:
    """The host under which a server that listens on `host` answers on this machine."""
    if host in WILDCARDS_OF_BOTH:
        return _loopback()
    return "127.0.0.1" if host == "0.0.0.0" else host


def url_of(host: str, port: int, *, ssl: bool = False) -> str:
    """`host` as it stands, in a URL: brackets around an IPv6 address."""
    return f"{'https' if ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _own_address(family: socket.AddressFamily) -> str | None:
    """The address of ours that leads outside, or None when none does."""
    # Connecting a datagram socket sends nothing; it only asks the kernel. The targets are reserved for documentation.
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
