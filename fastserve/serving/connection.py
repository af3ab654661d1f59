"""HTTP connections with deadlines and bounds: uvicorn's protocol has neither.

`BoundedProtocol` counts bytes where they arrive and notes deadlines where the state of a connection changes; one timer
for all connections (`ConnectionTable`) looks at the deadlines twice a second. Pieces of an answer on their way out pass
none of this.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import socket
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from fastserve.config import ServerConfig
from fastserve.errors import (
    FastserveError,
    HeadersTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    ShortageError,
    ShuttingDownError,
)
from fastserve.observability.logging import Throttle
from fastserve.serving.pacing import BytePacer
from fastserve.serving.shortage import max_connections_of_process

logger = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 0.5
MAX_SWEPT_AT_ONCE = 250
"""With more connections a sweep goes in parts: requests would wait for it."""
LINGER_S = 2.0
"""How long the rest of a request is read and dropped after its answer. A connection closed with unread bytes is reset,
and the client would lose the answer."""
MAX_DROPPED_BYTES_PER_S = 32 * 2**20
"""Of all connections together: whoever sends as fast as he can should not have the event loop do nothing but read."""
_DROPPED_BURST_BYTES = 2 * 2**20
FULL_LOG_INTERVAL_S = 5.0
MAX_PIPELINED = 16
"""Requests that may wait behind the one that is answered."""
MAX_LINGERING = 256
"""Refused connections that are kept for LINGER_S, if a quarter of all connections is not less; more are reset."""
_NEVER = math.inf


@dataclass(frozen=True)
class ConnectionLimits:
    max_connections: int
    max_connections_per_address: int
    max_head_bytes: int
    max_header_lines: int
    head_timeout_s: float
    body_timeout_s: float
    write_timeout_s: float
    max_handshakes: int


def connection_limits(config: ServerConfig) -> ConnectionLimits:
    """Call it when the limit of open files has its final value."""
    max_connections = max_connections_of_process(config.max_connections)
    return ConnectionLimits(
        max_connections,
        config.max_connections_per_address,
        config.max_head_bytes,
        config.max_header_lines,
        config.head_timeout_s,
        config.body_timeout_s,
        config.write_timeout_s,
        # They take files too, beside those of connections.
        max(1, min(config.max_handshakes, max_connections // 4)),
    )


class ConnectionTable:
    """All connections of a server: admits them, and enforces their deadlines until `close`."""

    def __init__(self, limits: ConnectionLimits, loop: asyncio.AbstractEventLoop) -> None:
        self.limits = limits
        self._loop = loop
        self._connections: set[BoundedProtocol] = set()
        self._per_address: Counter[str] = Counter()
        self._num_lingering = 0
        self.num_silent = 0
        self._full_log = Throttle(FULL_LOG_INTERVAL_S, loop.time)
        self._unswept: list[BoundedProtocol] = []
        """Connections that this sweep has still to look at."""
        self._sweep_pause_s = SWEEP_INTERVAL_S
        self.dropped = BytePacer(MAX_DROPPED_BYTES_PER_S, _DROPPED_BURST_BYTES, loop.time)
        """What is read of requests only to be dropped."""
        self._timer = loop.call_later(SWEEP_INTERVAL_S, self._sweep)

    def __len__(self) -> int:
        return len(self._connections)

    def admit(self, connection: BoundedProtocol) -> FastserveError | None:
        """Count a new connection; the reason when there is no room for it. Either way `remove` must follow."""
        refusal = self._refusal(connection.address)
        self._connections.add(connection)
        if connection.address is not None:
            self._per_address[connection.address] += 1
        return refusal

    def remove(self, connection: BoundedProtocol) -> None:
        self._connections.discard(connection)
        if connection.is_lingering:
            self._num_lingering -= 1
        self._release(connection.address)

    def _release(self, address: str | None) -> None:
        if address is not None:
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]

    def has_room(self, address: str | None) -> bool:
        """Whether a connection from this address would be admitted."""
        return self._refusal(address) is None

    def add_silent(self, address: str | None) -> None:
        """Count a connection that is a mere socket yet, until `remove_silent`."""
        self.num_silent += 1
        if address is not None:
            self._per_address[address] += 1

    def remove_silent(self, address: str | None) -> None:
        self.num_silent -= 1
        self._release(address)

    def add_lingering(self) -> bool:
        """Count a connection that lingers, until it is removed; whether there is room for it."""
        self._num_lingering += 1
        return self._num_lingering <= min(MAX_LINGERING, self.limits.max_connections // 4)

    def abort_all(self) -> None:
        for connection in list(self._connections):
            connection.abort()

    def close(self) -> None:
        self._timer.cancel()

    def _refusal(self, address: str | None) -> FastserveError | None:
        if len(self._connections) + self.num_silent - self._num_lingering >= self.limits.max_connections:
            if self._full_log.passes():
                logger.warning("all %d connections are in use; new ones are refused", self.limits.max_connections)
            return ShortageError(
                f"All {self.limits.max_connections} connections of this server are in use; try again in a moment."
            )
        most = self.limits.max_connections_per_address
        if address is not None and self._per_address[address] >= most:
            return ShortageError(
                f"{most} connections from {address} are open, which is the most for one address: use fewer, or raise "
                "the server's --max-connections-per-address."
            )
        return None

    def _sweep(self) -> None:
        now = self._loop.time()
        if not self._unswept:
            self._unswept = list(self._connections)
            num_parts = max(1, math.ceil(len(self._unswept) / MAX_SWEPT_AT_ONCE))
            self._sweep_pause_s = SWEEP_INTERVAL_S / num_parts
        part = self._unswept[-MAX_SWEPT_AT_ONCE:]
        del self._unswept[-MAX_SWEPT_AT_ONCE:]
        for connection in part:
            if connection in self._connections:  # else it was closed during the sweep
                connection.enforce(now)
        self._timer = self._loop.call_later(self._sweep_pause_s, self._sweep)


class _RefusedError(Exception):
    """Raised inside the parser, to end it; the refusal says how to answer."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    A message is read in two phases, head and body, each with a deadline; between messages uvicorn's keep-alive timer
    runs. While an answer is under way, later messages wait for their turn, and their clocks with them.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        table: ConnectionTable,
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._table = table
        self._limits = table.limits
        self.address: str | None = None
        """The client's, unless it is one of this machine."""
        self.is_lingering = False
        """The last answer has been written; what still comes is dropped."""
        self._answering: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the last one that came."""
        self._refusal: FastserveError | None = None
        self._has_begun = False
        """A message is incomplete (or, before the first one, has not begun to come)."""
        self._in_body = False
        """Its head is complete."""
        self._num_overhead_bytes = 0
        """Bytes of the message beside its body, less what the body pays for."""
        self._num_piece_bytes = 0
        self._num_headers = 0
        self._read_deadline = _NEVER
        self._write_deadline = _NEVER
        self._linger_deadline = _NEVER

    # ---- called by the transport ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = client_address(transport.get_extra_info("peername"), transport.get_extra_info("socket"))
        refusal = self._table.admit(self)
        if refusal is None:
            self._read_deadline = self.loop.time() + self._limits.head_timeout_s
        elif self._linger():
            self._write_last(refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        self._table.remove(self)
        self._unset_keepalive_if_required()
        self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_lingering:
            self._pace_dropping(len(data))
            return
        if not self._has_begun:
            self._begin_message()
        self._num_piece_bytes = len(data)
        self._num_overhead_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._num_overhead_bytes > self._limits.max_head_bytes and self._has_begun:
            self._refuse(self._too_large())
        if self._linger_deadline != _NEVER:
            self._pace_dropping(len(data))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.time() + self._limits.write_timeout_s

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_deadline = _NEVER

    # ---- called by the parser -------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._has_begun:
            # It begins within a piece of data: its size is counted from the next piece on.
            self._begin_message()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > self._limits.max_header_lines:
            self._refusal = HeadersTooLargeError(
                f"The request has more than {self._limits.max_header_lines} headers, which is the most."
            )
            raise _RefusedError
        if not self._in_body:  # else it is a trailer, which must not change what has been looked at
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if max(self._num_piece_bytes, self._num_overhead_bytes) > self._limits.max_head_bytes:
            # Bytes of other parts or messages may have come in the same piece, so the count is not exact.
            head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head_bytes > self._limits.max_head_bytes:
                self._refusal = self._too_large()
                raise _RefusedError
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = InvalidRequestError(f"More than {MAX_PIPELINED} requests wait on this connection.")
            raise _RefusedError
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._refusal = InvalidRequestError("CONNECT is not supported: this server is no proxy.")
                raise _RefusedError
            # Upgrades are not taken, as HTTP allows. The parser stops here and leaves the body away: see `_parse`.
            return
        self._in_body = True
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle
        if not (self.cycle.keep_alive and self.parser.should_keep_alive()):
            self.cycle.transport = _LingeringTransport(self)  # type: ignore[assignment]
        self._set_read_deadline()

    def on_body(self, body: bytes) -> None:
        # Chunks of any use are larger than their frames, so the body pays for its framing.
        self._num_overhead_bytes = max(self._num_overhead_bytes - 2 * len(body), -self._limits.max_head_bytes)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._has_begun = False
        self._in_body = False
        self._num_overhead_bytes = 0
        self._read_deadline = _NEVER
        if self._linger_deadline != _NEVER:
            # The answer was early, and the request has come whole after all: the connection goes on.
            self._linger_deadline = _NEVER
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # ---- called by uvicorn ----------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        is_early = self._in_body and not self.pipeline
        if self._answering is not None:
            # The connection keeps the cycle until the next request comes: not with what nobody has read.
            self._answering.body = bytearray()
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.is_lingering or self.transport.is_closing():
            return
        if not is_early:
            if self._has_begun:
                self._unset_keepalive_if_required()
            self._set_read_deadline()
        elif self.expect_100_continue:
            # The client may send the body or, as it has its answer, the next request: nobody can tell them apart.
            self.close_with_rest()
        else:
            self._unset_keepalive_if_required()
            self._read_deadline = _NEVER
            self._linger_deadline = self.loop.time() + LINGER_S

    def send_400_response(self, msg: str) -> None:
        refusal, self._refusal = self._refusal, None
        self._refuse(refusal or InvalidRequestError("The request is not valid HTTP/1.1.", code="invalid_http"))

    def shutdown(self) -> None:
        """The drain begins: what is being answered may end; a request that is not complete is refused."""
        if self.is_lingering:
            return
        cycle = self.cycle
        if self._in_body and not self.pipeline and not cycle.response_started:
            self._refuse(ShuttingDownError("The server is shutting down; send the request again."))
        else:
            super().shutdown()

    # ---- ours -----------------------------------------------------------------------------------------------

    def enforce(self, now: float) -> None:
        """Act on the deadlines that have passed."""
        if now >= self._write_deadline or now >= self._linger_deadline:
            self.abort()
        elif self.transport.is_closing():
            # Closing waits until the client has read what is left: not for ever.
            if self._write_deadline == _NEVER:
                self._write_deadline = now + self._limits.write_timeout_s
        elif now >= self._read_deadline:
            if not self._has_begun:
                self.transport.close()  # not a byte has come
            elif self._in_body:
                seconds = self._limits.body_timeout_s
                self._refuse(RequestTimeoutError(f"The body of the request was not complete after {seconds:g} s."))
            else:
                seconds = self._limits.head_timeout_s
                self._refuse(RequestTimeoutError(f"The headers of the request were not complete after {seconds:g} s."))

    @property
    def is_idle(self) -> bool:
        """Whether a next message may come, of which nothing has come yet."""
        return not self._has_begun and not self.is_lingering

    def abort(self) -> None:
        """Close at once, without what is still to be written."""
        self._disconnect()
        self.transport.abort()

    def close_with_rest(self) -> None:
        """Close after the last answer; what the client still sends is read and dropped for a moment before."""
        if not self._in_body:
            self.transport.close()
        elif self._linger():
            self._write_eof()

    def _parse(self, data: bytes) -> None:
        try:
            while data and not self.is_lingering:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                self._parse_head_without_upgrade()
        except httptools.HttpParserError:
            self.send_400_response("")

    def _parse_head_without_upgrade(self) -> None:
        """Give the head at which the parser stopped to another one, without the wish that it stopped for."""
        head = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
        head += [b"%s: %s" % item for item in self.headers if item[0] not in (b"upgrade", b"connection")]
        self._num_headers = 0
        self.parser = _new_parser(self)
        self.parser.feed_data(b"\r\n".join(head) + b"\r\n\r\n")

    def _disconnect(self) -> None:
        """Let the application see that its client is gone. uvicorn does so for the last request that came only."""
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()
            self._answering = None

    def _begin_message(self) -> None:
        self._has_begun = True
        self._in_body = False
        self._num_overhead_bytes = 0
        self._num_headers = 0
        self._set_read_deadline()

    def _set_read_deadline(self) -> None:
        """Start the clock of the phase, unless an earlier message is still being answered."""
        if not self._has_begun or self.pipeline:
            self._read_deadline = _NEVER
        elif self._in_body:
            self._read_deadline = self.loop.time() + self._limits.body_timeout_s
        elif self.cycle is None or self.cycle.response_complete:
            self._read_deadline = self.loop.time() + self._limits.head_timeout_s
        else:
            self._read_deadline = _NEVER

    def _too_large(self) -> HeadersTooLargeError:
        return HeadersTooLargeError(
            f"Request line, headers and framing take more than {self._limits.max_head_bytes} bytes, which is the most."
        )

    def _refuse(self, refusal: FastserveError) -> None:
        """Answer in place of the application and close."""
        if self.is_lingering or self.transport.is_closing():
            return
        cycle = self.cycle
        is_answering = cycle is not None and not cycle.response_complete
        if is_answering and (cycle.response_started or not self._in_body or self.pipeline):
            # The answer under way is another request's, or half of this one's: cutting it is all that is left.
            self.abort()
            return
        self._disconnect()
        if self._linger():
            self._write_last(refusal)

    def _linger(self) -> bool:
        """Read and drop from now on, until the client closes or LINGER_S are over. False: there is no room for that,
        and the connection is closed."""
        self.is_lingering = True
        self._read_deadline = _NEVER
        self._linger_deadline = self.loop.time() + LINGER_S
        self._unset_keepalive_if_required()
        if not self._table.add_lingering():
            self.abort()
            return False
        self.flow.resume_reading()
        return True

    def _pace_dropping(self, num_bytes: int) -> None:
        """Read on in a while, when all connections together drop more than they may. The kernel holds the sender up."""
        wait_s = self._table.dropped.take(num_bytes)
        if wait_s > 0 and not self.transport.is_closing():
            self.flow.pause_reading()
            self.loop.call_later(wait_s, self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _write_last(self, refusal: FastserveError) -> None:
        self.transport.write(_response(refusal))
        self._write_eof()

    def _write_eof(self) -> None:
        if self.transport.can_write_eof():
            self.transport.write_eof()


def _new_parser(connection: BoundedProtocol) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(connection)
    # As uvicorn's own: what comes after a last request is no error.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


class _LingeringTransport:
    """The transport as uvicorn's answer sees it on a connection that closes with this answer: `close` lingers."""

    def __init__(self, connection: BoundedProtocol) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        self._connection.close_with_rest()


def _response(refusal: FastserveError) -> bytes:
    body = json.dumps(refusal.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **refusal.headers(),
    }
    lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def client_address(peer: object, sock: socket.socket | None) -> str | None:
    """The address that a connection is counted by, or None when its client is of this machine: a proxy or a service of
    ours, for many clients. `peer`: the client's socket address.

    Public IPv6 addresses are given out by networks of 64 bits, so the network counts as one.
    """
    if not isinstance(peer, tuple) or not peer:
        return None
    address = str(peer[0])
    if address == "127.0.0.1":
        return None  # the usual case, told at little cost
    try:
        own = sock.getsockname()[0] if sock is not None else None
        if address == own:
            return None
        parsed = ipaddress.ip_address(address)
    except (ValueError, OSError):
        return address
    if parsed.is_loopback:
        return None
    if parsed.version == 6 and parsed.is_global:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address
