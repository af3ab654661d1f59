"""HTTP connections with deadlines and bounds: uvicorn's protocol has neither.

`BoundedProtocol` counts bytes as they arrive and sets deadlines when the state of a connection changes; one timer for
all connections (`ConnectionTable`) checks the deadlines twice a second. Outgoing data does not pass through this code.
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
"""Connections checked in one go. A sweep of more is split, so that requests do not wait for it."""
LINGER_S = 2.0
"""Seconds for which the rest of a request is read and dropped after its answer. A connection closed with unread bytes
is reset, and the client would lose the answer."""
MAX_DROPPED_BYTES_PER_S = 32 * 2**20
"""Rate limit for dropped bytes, shared by all connections: fast senders must not keep the event loop busy reading."""
_DROPPED_BURST_BYTES = 2 * 2**20
FULL_LOG_INTERVAL_S = 5.0
MAX_PIPELINED = 16
"""Requests that may wait on a connection behind the one being answered."""
MAX_LINGERING = 256
"""Refused connections kept for LINGER_S (at most a quarter of all connections); more are reset."""
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
    """The limits of one server. Call it after the limit of open files has been raised."""
    max_connections = max_connections_of_process(config.max_connections)
    return ConnectionLimits(
        max_connections,
        config.max_connections_per_address,
        config.max_head_bytes,
        config.max_header_lines,
        config.head_timeout_s,
        config.body_timeout_s,
        config.write_timeout_s,
        # Handshakes use open files too, in addition to those of connections.
        max(1, min(config.max_handshakes, max_connections // 4)),
    )


class ConnectionTable:
    """All connections of a server: admits them and enforces their deadlines until `close`."""

    def __init__(self, limits: ConnectionLimits, loop: asyncio.AbstractEventLoop) -> None:
        self.limits = limits
        self._loop = loop
        self._connections: set[BoundedProtocol] = set()
        self._per_address: Counter[str] = Counter()
        self._num_lingering = 0
        self.num_silent = 0
        self._full_log = Throttle(FULL_LOG_INTERVAL_S, loop.time)
        self._unswept: list[BoundedProtocol] = []
        """Connections that the current sweep has not checked yet."""
        self._sweep_pause_s = SWEEP_INTERVAL_S
        self.dropped = BytePacer(MAX_DROPPED_BYTES_PER_S, _DROPPED_BURST_BYTES, loop.time)
        """Rate of the bytes that are read only to be dropped."""
        self._timer = loop.call_later(SWEEP_INTERVAL_S, self._sweep)

    def __len__(self) -> int:
        return len(self._connections)

    def admit(self, connection: BoundedProtocol) -> FastserveError | None:
        """Count a new connection; returns the error if there is no room for it. Either way `remove` must follow."""
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
        """Count a connection that has sent nothing yet, until `remove_silent`."""
        self.num_silent += 1
        if address is not None:
            self._per_address[address] += 1

    def remove_silent(self, address: str | None) -> None:
        self.num_silent -= 1
        self._release(address)

    def add_lingering(self) -> bool:
        """Count a lingering connection until it is removed. Returns whether there is room for it."""
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
        max_connections = self.limits.max_connections_per_address
        if address is not None and self._per_address[address] >= max_connections:
            return ShortageError(
                f"{max_connections} connections from {address} are open, the maximum for one address: use fewer, or "
                "raise the server's --max-connections-per-address."
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
            if connection in self._connections:  # not closed during the sweep
                connection.enforce(now)
        self._timer = self._loop.call_later(self._sweep_pause_s, self._sweep)


class _RefusedError(Exception):
    """Raised inside the parser to stop it; holds the error to answer with."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    A request is read in two phases, head and body, each with a deadline; between requests uvicorn's keep-alive timer
    runs. While one is being answered, later (pipelined) requests wait, and their deadlines have not begun.
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
        """The client's address as counted by the table; None for clients on this machine."""
        self.is_lingering = False
        """The last answer has been written; further input is dropped."""
        self._answering: RequestResponseCycle | None = None
        """The request being answered; uvicorn's `cycle` is the last one that came."""
        self._refusal: FastserveError | None = None
        self._has_begun = False
        """A request is incomplete (or the first one has not begun)."""
        self._in_body = False
        """The head of that request is complete."""
        self._num_overhead_bytes = 0
        """Bytes of the request besides its body, less the framing that its body allows."""
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
            # It may begin in the middle of this data, so its size is counted from the next data on.
            self._begin_message()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > self._limits.max_header_lines:
            self._refusal = HeadersTooLargeError(
                f"The request has more than {self._limits.max_header_lines} headers, the maximum."
            )
            raise _RefusedError
        if not self._in_body:  # trailers must not change headers that were already checked
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if max(self._num_piece_bytes, self._num_overhead_bytes) > self._limits.max_head_bytes:
            # Bytes of other parts or requests may have come in the same data, so the count is not exact.
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
            # Upgrades are ignored, as HTTP allows. The parser stops here and omits the body: see `_parse`.
            return
        self._in_body = True
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle
        if not (self.cycle.keep_alive and self.parser.should_keep_alive()):
            self.cycle.transport = _LingeringTransport(self)  # type: ignore[assignment]
        self._set_read_deadline()

    def on_body(self, body: bytes) -> None:
        # Reasonable chunks are larger than their framing, so each body byte allows for one byte of it.
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
            # The answer came before the end of the body, which is complete now: keep the connection.
            self._linger_deadline = _NEVER
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # ---- called by uvicorn ----------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        is_early = self._in_body and not self.pipeline
        if self._answering is not None:
            # The connection keeps the cycle until the next request: free its unread body.
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
            # The client may go on with the body or, having its answer, send the next request: it could be either.
            self.close_with_rest()
        else:
            self._unset_keepalive_if_required()
            self._read_deadline = _NEVER
            self._linger_deadline = self.loop.time() + LINGER_S

    def send_400_response(self, msg: str) -> None:
        refusal, self._refusal = self._refusal, None
        self._refuse(refusal or InvalidRequestError("The request is not valid HTTP/1.1.", code="invalid_http"))

    def shutdown(self) -> None:
        """Begin the drain: the request being answered may finish; an incomplete one is refused."""
        if self.is_lingering:
            return
        cycle = self.cycle
        if self._in_body and not self.pipeline and not cycle.response_started:
            self._refuse(ShuttingDownError("The server is shutting down; send the request again."))
        else:
            super().shutdown()

    # ---- ours -----------------------------------------------------------------------------------------------

    def enforce(self, now: float) -> None:
        """Act on deadlines that have passed at `now`, seconds of the event loop's clock."""
        if now >= self._write_deadline or now >= self._linger_deadline:
            self.abort()
        elif self.transport.is_closing():
            # Closing waits until the client has read the rest, but no longer than this.
            if self._write_deadline == _NEVER:
                self._write_deadline = now + self._limits.write_timeout_s
        elif now >= self._read_deadline:
            if not self._has_begun:
                self.transport.close()  # nothing was sent
            elif self._in_body:
                seconds = self._limits.body_timeout_s
                self._refuse(RequestTimeoutError(f"The body of the request was not complete after {seconds:g} s."))
            else:
                seconds = self._limits.head_timeout_s
                self._refuse(RequestTimeoutError(f"The headers of the request were not complete after {seconds:g} s."))

    @property
    def is_idle(self) -> bool:
        """Whether the connection waits for its next request and nothing of it has come."""
        return not self._has_begun and not self.is_lingering

    def abort(self) -> None:
        """Close at once and drop unsent data."""
        self._disconnect()
        self.transport.abort()

    def close_with_rest(self) -> None:
        """Close after the last answer, once the rest of the request was read and dropped for at most LINGER_S."""
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
        """Parse the head again with a new parser, without the upgrade headers at which the first one stopped."""
        head = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
        head += [b"%s: %s" % item for item in self.headers if item[0] not in (b"upgrade", b"connection")]
        self._num_headers = 0
        self.parser = _new_parser(self)
        self.parser.feed_data(b"\r\n".join(head) + b"\r\n\r\n")

    def _disconnect(self) -> None:
        """Signal the disconnect to the application. uvicorn does so only for the last request that came."""
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
        """Set the deadline of the current phase, unless an earlier request is still being answered."""
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
            f"Request line, headers and framing take more than {self._limits.max_head_bytes} bytes, the maximum."
        )

    def _refuse(self, refusal: FastserveError) -> None:
        """Answer with an error in place of the application, and close."""
        if self.is_lingering or self.transport.is_closing():
            return
        cycle = self.cycle
        is_answering = cycle is not None and not cycle.response_complete
        if is_answering and (cycle.response_started or not self._in_body or self.pipeline):
            # Another request's answer, or a part of this one's, is being written: the connection can only be cut.
            self.abort()
            return
        self._disconnect()
        if self._linger():
            self._write_last(refusal)

    def _linger(self) -> bool:
        """Read and drop input until the client closes or LINGER_S are over. Returns False if there is no room for that;
        the connection is closed then."""
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
        """Pause reading if all connections together drop more than MAX_DROPPED_BYTES_PER_S; TCP slows the sender."""
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
    # As in uvicorn: data after the last request is no error.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


class _LingeringTransport:
    """Transport for uvicorn's last answer on a connection: `close` lingers first."""

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
    """The address that a connection is counted under. `peer`: the client's socket address.

    None for clients on this machine, which may be proxies or services of ours that serve many clients. A public IPv6
    address counts as its /64 network, as providers assign whole networks.
    """
    if not isinstance(peer, tuple) or not peer:
        return None
    address = str(peer[0])
    if address == "127.0.0.1":
        return None  # the usual case, cheap to detect
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
