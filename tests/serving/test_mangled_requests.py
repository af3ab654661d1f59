"""Fuzzing: requests cut, spliced, repeated and mutated at random cause no traceback, and the service goes on."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

import pytest

from tests.serving.wire import StartService, wait_until

REQUESTS = [
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"HEAD /things/a%20b HTTP/1.0\r\n\r\n",
    b"GET /sleep?seconds=0.05 HTTP/1.1\r\n\r\n",
    b"GET /stream?count=3&pause_s=0.01 HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"POST /size HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /size HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nT: x\r\n\r\n",
    b"POST /size HTTP/1.1\r\nContent-Length: 20000\r\nConnection: close\r\n\r\n" + b"x" * 20_000,
    b"POST /size HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /size HTTP/1.1\r\nUpgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /unread HTTP/1.1\r\nContent-Length: 20000\r\nExpect: 100-continue\r\n\r\n",
]


def mangled(rng: random.Random) -> bytes:
    data = b"".join(rng.choice(REQUESTS) for _ in range(rng.randint(1, 4)))
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(data))
        inserted = rng.choice([bytes([rng.randrange(256)]), b"", rng.choice(REQUESTS)[: rng.randint(1, 30)]])
        data = data[:at] + inserted + data[at + 1 :]
    return data


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_mangled_requests_leave_nothing_behind(start_service: StartService, count: int) -> None:
    rng = random.Random(count)
    service = start_service(
        *("--head-timeout-s", "0.5", "--body-timeout-s", "0.5", "--write-timeout-s", "0.5"),
        *("--keep-alive-timeout-s", "1", "--max-body-bytes", "10000"),
    )
    for _ in range(count):
        data = mangled(rng)
        with service.wire() as wire, suppress(OSError):
            while data:
                size = rng.choice([1, 7, 100, 100_000])
                wire.send(data[:size])
                data = data[size:]
            if rng.random() < 0.3:
                wire.socket.shutdown(socket.SHUT_WR)
            wire.read_to_end(rng.choice([0.001, 0.05, 0.2]))
    assert service.ask().status == 200
    wait_until(lambda: service.num_connections() == 0, "no connection is left")
    assert "Traceback" not in service.log
