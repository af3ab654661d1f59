"""New connections: accepted a few at a time, and only sockets until they send something."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import pytest
import uvloop

from fastserve.serving.accepting import MAX_PER_PASS, listen
from fastserve.serving.connection import ConnectionLimits, ConnectionTable
from tests.worker.conftest import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the event loop's own server accepts")


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@asynccontextmanager
async def accepting(
    listener: socket.socket | None = None, **limits: Any
) -> AsyncIterator[tuple[int, list[Echo], ConnectionTable]]:
    """Yields the port, the protocols made, and the connection table."""
    sock = listener or socket.create_server(("127.0.0.1", 0), backlog=1024)
    made: list[Echo] = []

    def make() -> Echo:
        made.append(Echo())
        return made[-1]

    table = ConnectionTable(ConnectionLimits(**{**LIMITS, **limits}), asyncio.get_running_loop())
    [server] = await listen([sock], make, table)
    try:
        yield sock.getsockname()[1], made, table
    finally:
        server.close()
        table.close()
        sock.close()
        for echo in made:
            echo.transport.abort()


LIMITS: dict[str, Any] = {
    "max_connections": 500, "max_connections_per_address": 500, "max_head_bytes": 1000, "max_header_lines": 10,
    "head_timeout_s": 30, "body_timeout_s": 30, "write_timeout_s": 30, "max_handshakes": 1,
}  # fmt: skip


@contextmanager
def clients(port: int, count: int) -> Any:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)]


def on_each_loop(test: Callable[[], Any]) -> None:
    asyncio.run(test())
    uvloop.run(test())


def test_a_crowd_is_let_in_a_few_at_a_time_and_others_go_on_meanwhile() -> None:
    async def run() -> None:
        async with accepting() as (port, made, table):
            with clients(port, 10 * MAX_PER_PASS) as crowd:
                peak = 0
                while table.num_silent < len(crowd):
                    before = table.num_silent
                    await asyncio.sleep(0)
                    peak = max(peak, table.num_silent - before)
                assert 0 < peak <= MAX_PER_PASS
                assert not made
            # They disconnect all at once, which is handled a few at a time too.
            peak = 0
            while table.num_silent:
                before = table.num_silent
                await asyncio.sleep(0)
                peak = max(peak, before - table.num_silent)
            assert 0 < peak <= MAX_PER_PASS
            assert not made, "no protocol was made for silent connections"

    on_each_loop(run)


def test_a_connection_is_served_from_its_first_byte_on() -> None:
    async def run() -> None:
        async with accepting() as (port, made, table):
            with clients(port, 3) as (early, late, _):
                early.sendall(b"early")
                await until(lambda: len(made) == 1 and table.num_silent == 2)
                assert await asyncio.to_thread(early.recv, 10) == b"early"
                late.sendall(b"late")
                assert await asyncio.to_thread(late.recv, 10) == b"late"
                assert (len(made), table.num_silent) == (2, 1)

    on_each_loop(run)


def test_silent_connections_are_closed_in_the_end_and_when_the_server_closes() -> None:
    async def run() -> None:
        async with accepting(head_timeout_s=0.2) as (port, made, table):
            with clients(port, 300) as crowd:
                await until(lambda: table.num_silent == 300)
                await until(lambda: table.num_silent == 0)
                assert await asyncio.to_thread(crowd[-1].recv, 1) == b""
        async with accepting() as (port, _, table):
            kept = socket.create_connection(("127.0.0.1", port))
            await until(lambda: table.num_silent == 1)
        assert (await asyncio.to_thread(kept.recv, 1), table.num_silent) == (b"", 0)
        kept.close()
        assert not made

    on_each_loop(run)


def test_silent_connections_count_and_those_without_room_are_answered() -> None:
    async def run() -> None:
        async with accepting(max_connections=5) as (port, made, table):
            with clients(port, 5):
                await until(lambda: table.num_silent == 5)
                with clients(port, 2):
                    # The connection answers with the refusal.
                    await until(lambda: len(made) == 2)
                assert table.num_silent == 5
            await until(lambda: table.num_silent == 0)

    on_each_loop(run)


class FailsOnce(socket.socket):
    code = 0
    num_failures = 0

    def accept(self) -> Any:
        if not self.num_failures:
            self.num_failures = 1
            raise OSError(self.code, os.strerror(self.code))
        return super().accept()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENETDOWN, errno.EPROTO, errno.EPERM], ids=errno.errorcode.get)
def test_a_failed_accept_only_delays(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A shortage of files passes, and so does what the network or a firewall did to one connection."""
    monkeypatch.setattr("fastserve.serving.accepting.PAUSE_S", 0.05)

    async def run() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        listener = FailsOnce(fileno=sock.detach())
        listener.code = code
        async with accepting(listener) as (port, made, _):
            with clients(port, 1) as [client]:
                client.sendall(b"patient")
                assert await asyncio.to_thread(client.recv, 10) == b"patient"
        assert (listener.num_failures, len(made)) == (1, 1)

    on_each_loop(run)
    assert "no connection can be accepted now" in caplog.text
