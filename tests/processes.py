"""Ports and processes of services that tests start."""

from __future__ import annotations

import socket

import psutil


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def is_alive(pid: int) -> bool:
    """A zombie has ended: it only waits for whoever inherited it to take notice."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
