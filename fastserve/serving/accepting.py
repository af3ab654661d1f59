"""Accepts connections in small batches, and makes no objects for silent ones (those that have sent nothing).

asyncio's server accepts all pending connections before it does anything else, and makes a transport and a protocol for
each; thousands of connects or disconnects at once would block all requests. Here a connection is only a socket until
its first byte has come, and each iteration of the event loop accepts, reads and closes a bounded number.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from fastserve.observability.logging import Throttle
from fastserve.serving.connection import ConnectionTable, client_address

logger = logging.getLogger(__name__)

BACKLOG = 4096
MAX_PER_PASS = 16
"""Connections accepted, or polled, in one iteration of the event loop: about half a millisecond."""
SWEEP_INTERVAL_S = 0.5
MAX_CLOSED_PER_PASS = 256
PAUSE_S = 1.0
PAUSE_LOG_INTERVAL_S = 5.0


class Listener(Protocol):
    """A listening socket that can be closed; uvicorn calls it a server."""

    def close(self) -> None: ...


async def listen(
    sockets: Sequence[socket.socket],
    make_protocol: Callable[[], asyncio.Protocol],
    table: ConnectionTable,
) -> list[Listener]:
    """Accept connections without TLS until the returned listeners are closed (with TLS: `handshakes.py`)."""
    loop = asyncio.get_running_loop()
    if hasattr(select, "epoll"):
        return [_Acceptor(sock, make_protocol, table, loop) for sock in sockets]
    return [await loop.create_server(make_protocol, sock=sock, backlog=BACKLOG) for sock in sockets]


class _Silent(NamedTuple):
    """A connection that has sent nothing yet; `deadline` is in seconds of the event loop's clock."""

    sock: socket.socket
    address: str | None
    deadline: float


class _Acceptor:
    """Accepts the connections of one listening socket."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        table: ConnectionTable,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._table = table
        self._loop = loop
        self._silent: dict[int, _Silent] = {}
        """Silent connections by file descriptor, oldest first."""
        self._connecting: set[asyncio.Task[None]] = set()
        self._pause_log = Throttle(PAUSE_LOG_INTERVAL_S, loop.time)
        self._epoll = select.epoll()
        listener.setblocking(False)
        listener.listen(BACKLOG)
        if listener.family in (socket.AF_INET, socket.AF_INET6):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections inherit it
        loop.add_reader(listener.fileno(), self._accept)
        loop.add_reader(self._epoll.fileno(), self._connect_ready)
        self._timer = loop.call_later(SWEEP_INTERVAL_S, self._sweep)
        self._resume: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Accept no more connections, and close the silent ones."""
        self._timer.cancel()
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._loop.remove_reader(self._epoll.fileno())
        for fd in list(self._silent):
            self._forget(fd).sock.close()
        self._epoll.close()
        for task in self._connecting:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(MAX_PER_PASS):
            try:
                sock, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            sock.setblocking(False)
            address = client_address(peer, sock)
            # If there is no room, the protocol answers with 503.
            if self._table.has_room(address) and _is_silent(sock):
                self._silent[sock.fileno()] = _Silent(
                    sock, address, self._loop.time() + self._table.limits.head_timeout_s
                )
                self._epoll.register(sock.fileno(), select.EPOLLIN)
                self._table.add_silent(address)
            else:
                self._connect(sock)

    def _connect_ready(self) -> None:
        for fd, _ in self._epoll.poll(0, MAX_PER_PASS):
            sock = self._forget(fd).sock
            if _is_closed(sock):
                sock.close()
            else:
                self._connect(sock)

    def _forget(self, fd: int) -> _Silent:
        silent = self._silent.pop(fd)
        self._epoll.unregister(fd)
        self._table.remove_silent(silent.address)
        return silent

    def _connect(self, sock: socket.socket) -> None:
        task = self._loop.create_task(self._make_connection(sock))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _make_connection(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, sock)
        except OSError:  # the client is gone
            sock.close()

    def _pause(self, error: OSError) -> None:
        """Stop accepting for a moment; pending connections wait in the kernel. For any error: a shortage passes, and so
        do errors of the network, which Linux reports for connections that wait to be accepted."""
        if self._pause_log.passes():
            logger.warning("no connection can be accepted now (%s); new ones wait", error.strerror)
        self._loop.remove_reader(self._listener.fileno())
        self._resume = self._loop.call_later(PAUSE_S, self._loop.add_reader, self._listener.fileno(), self._accept)

    def _sweep(self) -> None:
        """Close silent connections whose deadline has passed."""
        now = self._loop.time()
        interval_s = SWEEP_INTERVAL_S
        for num_closed, (fd, silent) in enumerate(list(self._silent.items())):
            if silent.deadline > now:
                break
            if num_closed == MAX_CLOSED_PER_PASS:
                interval_s = 0.0
                break
            self._forget(fd).sock.close()
        self._timer = self._loop.call_later(interval_s, self._sweep)


def _is_silent(sock: socket.socket) -> bool:
    """Whether the connection is open and has sent nothing."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_closed(sock: socket.socket) -> bool:
    """Whether the client has closed or reset the connection without sending anything."""
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
