"""Bounds the number and duration of TLS handshakes.

asyncio's servers do not: a connection reaches its protocol, and is counted, only after the handshake. Here connections
are accepted one by one, and those beyond the bound are closed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable

from fastserve.observability.logging import Throttle
from fastserve.serving.connection import client_address

logger = logging.getLogger(__name__)

FULL_LOG_INTERVAL_S = 5.0
ACCEPT_RETRY_S = 0.1
"""Pause in seconds after a failed accept: without free files, retries would be a busy loop."""


class HandshakeAcceptor:
    """Accepts the TLS connections of listening sockets, until `close`."""

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext,
        *,
        max_handshakes: int,
        timeout_s: float,
    ) -> None:
        """`max_handshakes`: concurrent handshakes, half of them at most from one address that is not of this machine.
        `timeout_s`: for each handshake.
        """
        self._make_protocol = make_protocol
        self._context = context
        self._max_handshakes = max_handshakes
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        """One task for each listening socket, and one for each handshake."""
        self._num_handshakes = 0
        self._per_address: Counter[str] = Counter()
        self._full_log = Throttle(FULL_LOG_INTERVAL_S, self._loop.time)

    def listen(self, sock: socket.socket, backlog: int) -> None:
        sock.setblocking(False)
        sock.listen(backlog)
        self._start(self._loop.create_task(self._accept(sock)))

    async def close(self) -> None:
        """Accept no more connections, and abort unfinished handshakes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, peer = await self._loop.sock_accept(sock)
            except OSError as error:
                # The client has gone, or this process or machine is short of files or memory.
                if error.errno != errno.ECONNABORTED:
                    if self._full_log.passes():
                        logger.warning("connections cannot be accepted: %s", error.strerror)
                    await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            address = client_address(peer, connection)
            if self._has_room(address):
                self._start(self._loop.create_task(self._shake_hands(connection, address)))
            else:
                connection.close()

    def _has_room(self, address: str | None) -> bool:
        if self._num_handshakes >= self._max_handshakes:
            if self._full_log.passes():
                logger.warning("%d TLS handshakes are under way; new connections are closed", self._num_handshakes)
            return False
        return address is None or 2 * self._per_address[address] < self._max_handshakes

    async def _shake_hands(self, connection: socket.socket, address: str | None) -> None:
        self._num_handshakes += 1
        if address is not None:
            self._per_address[address] += 1
        try:
            await self._loop.connect_accepted_socket(
                self._make_protocol, connection, ssl=self._context, ssl_handshake_timeout=self._timeout_s
            )
        except OSError as error:  # not TLS, no valid certificate, timed out, or disconnected
            logger.debug("a TLS handshake failed: %s", error)
        finally:
            self._num_handshakes -= 1
            if address is not None:
                self._per_address[address] -= 1
                if not self._per_address[address]:
                    del self._per_address[address]
