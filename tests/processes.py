"""Ports and processes of services that tests start."""

from __future__ import annotations

import os
import random
import socket

import psutil

FIRST_PORT = 12_000
NUM_PORTS = 5_000
"""Ports for each of four test processes. All are below the ephemeral ports, as an outgoing connection could take one
before its service does."""


def free_ports(count: int) -> list[int]:
    """Free ports, different ones in each of the concurrent test processes."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST_PORT + worker % 4 * NUM_PORTS
    free: list[int] = []
    for port in random.sample(range(first, first + NUM_PORTS), NUM_PORTS):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        free.append(port)
        if len(free) == count:
            return free
    raise AssertionError(f"there are no {count} free ports")


def is_alive(pid: int) -> bool:
    """Whether the process runs. A zombie has ended and only waits for its parent."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
