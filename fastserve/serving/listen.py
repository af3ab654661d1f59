"""Listening sockets, and the address under which others reach them."""

from __future__ import annotations

import errno
import os
import socket

from fastserve.errors import StartupError


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind (not listen) every address that `host` resolves to; families that the machine lacks are passed over.

    Raises StartupError when the port is taken or no address can be bound. With port 0, all addresses share one port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartupError(f"--host {host}: the name cannot be resolved ({error.strerror}).") from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, address in sorted(set(found), key=lambda row: row[0] != socket.AF_INET):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
        except OSError as error:
            sock.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing = error
                continue
            for other in sockets:
                other.close()
            if error.errno == errno.EADDRINUSE:
                raise StartupError(
                    f"Port {port} on {host} is in use by another program: stop it, or choose another port with --port."
                ) from error
            raise StartupError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
        sockets.append(sock)
        port = sock.getsockname()[1]
    if not sockets:
        raise StartupError(f"--host {host}: this machine has no such address ({missing}).")
    return sockets


def advertised_address(host: str, port: int, *, ssl: bool = False) -> str:
    """The address under which others reach a server that listens on `host`; a wildcard becomes the machine's own."""
    if host in ("0.0.0.0", "::", ""):
        host = _own_address()
    if ":" in host:
        host = f"[{host}]"
    return f"{'https' if ssl else 'http'}://{host}:{port}"


def _own_address() -> str:
    # Connecting a datagram socket sends nothing; it only asks the kernel which of our addresses leads outside.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"
