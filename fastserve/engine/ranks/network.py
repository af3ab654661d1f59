"""Exchanges between the ranks of several machines.

Each machine has a shared segment with slots for the ranks of all machines. Its ranks exchange there as the ranks of one
machine do, inside kernels too. A relay in the process of the machine's first rank sends their parts to the other
machines, and writes the parts that come from there into the slots of their ranks. So sums are those of one machine, bit
by bit.

Relays talk over ZeroMQ with CURVE: a peer without the key can neither connect nor read or change anything.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_char_p, c_int64, c_uint32, c_void_p
from dataclasses import dataclass, field
from typing import Any

import torch
import zmq
from zmq.utils.monitor import parse_monitor_message

from fastserve.distributed.keys import CurveAuthenticator, CurveKeys
from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import RanksStruct, SharedMemoryCollectives
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_MS = 1000
HEARTBEAT_TIMEOUT_MS = 3000
"""A machine that is stopped or cut off is lost after this time, and at most one interval more."""
_HELLO_INTERVAL_S = 0.1
_POLL_MS = 100
_LEAVE_TIME_S = 0.2
"""From a broken connection until the machine counts as lost: its farewell may come later, on another connection."""
_LINGER_MS = 1000
_MAX_QUEUED_MESSAGES = 100
"""More than two are never needed: a machine is at most one exchange ahead."""
_HELLO, _PART, _FAREWELL = range(3)
_HEADER = struct.Struct("<BQHI")
"""Kind, generation, machine, and the number of the exchange (of a hello: whether the receiver's hello has come)."""
_SIZE = struct.Struct("<q")
_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


@dataclass(frozen=True)
class Machines:
    """The machines of a model, the same on each of them."""

    num_ranks: Sequence[int]
    """Of each machine. Ranks are numbered machine by machine."""
    generation: int
    """Of the group: grows each time it forms again. Messages of other generations are not read."""

    def ranks_of(self, machine: int) -> range:
        first = sum(self.num_ranks[:machine])
        return range(first, first + self.num_ranks[machine])


@dataclass
class _Peer:
    """Another machine."""

    machine: int
    socket: zmq.Socket[bytes]
    """Sends to it."""
    monitor: zmq.Socket[bytes]
    ranks: range
    has_greeted: bool = False
    has_heard: bool = False
    """Our hello has come there."""
    is_joined: bool = False
    has_failed_handshake: bool = False
    next_exchange: int = 0
    has_left: threading.Event = field(default_factory=threading.Event)
    lost_at: float | None = None
    """On the monotonic clock, unless it says farewell before."""


class NetworkRelay:
    """Relays parts between the ranks of this machine and those of others. Must be closed before the segment.

    When it loses another machine it declares the segment lost; when the segment is declared lost it leaves, so the
    others lose this machine.
    """

    def __init__(
        self, segment: Segment, machine: int, machines: Machines, keys: CurveKeys | None, address: str = "127.0.0.1:0"
    ) -> None:
        """Bind `address` (host:port; port 0: any free one). `keys`: None on networks where nobody else is.

        Raises StartupError where the kernels cannot be built, and when the address cannot be bound."""
        library = kernels_for_machines()
        library.wait_for_part.argtypes = (c_void_p, c_int64, c_uint32, c_void_p, c_void_p)
        library.write_part.argtypes = (c_void_p, c_int64, c_uint32, c_int64, c_char_p, c_int64)
        library.part_of.argtypes = (c_void_p, c_int64, c_uint32)
        library.part_of.restype = c_void_p
        self._library = library
        self._segment = segment
        self._machine = machine
        self._machines = machines
        self._own = machines.ranks_of(machine)
        self._keys = keys
        self._layout = repr((list(machines.num_ranks), segment.slot_bytes)).encode()
        first = self._own.start
        # Between steps nothing comes for a long time: the deadlines are those of the ranks.
        timeout_s = float("inf")
        self._struct = RanksStruct(segment.address, first, segment.num_ranks, segment.slot_bytes, timeout_s, 0, 0)
        self._peers: dict[int, _Peer] = {}
        self._is_ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = None if keys is None else CurveAuthenticator(self._context, keys)
        self._inbox = self._socket(zmq.PULL)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, segment.slot_bytes + 4096)
        self._inbox.setsockopt(zmq.IPV6, int(address.startswith("[")))
        if keys is not None:
            keys.secure_server(self._inbox)
        try:
            self._inbox.bind(f"tcp://{address}")
        except zmq.ZMQError as error:
            self._close_sockets()
            raise StartupError(f"Cannot listen at {address} for the other machines of the model: {error}.") from error
        self.address = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = _LINGER_MS
        socket.set_hwm(_MAX_QUEUED_MESSAGES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        return socket

    def join(self, addresses: Sequence[str], timeout_s: float, is_lost: Callable[[], bool] = lambda: False) -> None:
        """Connect to the other machines, wait until all are connected to each other, and relay in the background.

        `addresses`: of each machine's relay. Raises RankLostError at the deadline, when a machine says that there is a
        newer group or that it is divided otherwise, when the segment is declared lost, and once `is_lost`."""
        for machine, address in enumerate(addresses):
            if machine != self._machine:
                self._peers[machine] = self._connect(machine, address)
        deadline = time.monotonic() + timeout_s
        while missing := [peer for peer in self._peers.values() if not peer.is_joined]:
            for peer in missing:
                self._greet(peer)
            if time.monotonic() > deadline:
                raise RankLostError(_missing(missing, addresses, timeout_s))
            if self._segment.is_lost or is_lost():
                raise RankLostError("another rank of the model was lost while the machines joined")
            pause = time.monotonic() + _HELLO_INTERVAL_S
            while (left := pause - time.monotonic()) > 0 and self._inbox.poll(int(left * 1000) + 1):
                self._read(self._inbox.recv_multipart())
                if all(peer.is_joined for peer in self._peers.values()):
                    break
            for peer in self._peers.values():
                # Connections may break until the machine has joined: with processes of an older group.
                for event in _events(peer.monitor):
                    peer.has_failed_handshake |= bool(event & _FAILURES)
        for run in (self._send_parts, self._receive):
            thread = threading.Thread(target=self._run, args=(run,), name="relay", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _connect(self, machine: int, address: str) -> _Peer:
        socket = self._socket(zmq.PUSH)
        # Nothing is queued for a machine that is not connected.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.IPV6, 1)
        if self._keys is not None:
            self._keys.secure_client(socket)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _FAILURES)
        peer = _Peer(machine, socket, monitor, self._machines.ranks_of(machine))
        try:
            socket.connect(f"tcp://{address}")
        except zmq.ZMQError as error:
            socket.disable_monitor()
            socket.close()
            raise StartupError(f"{address} is no address of another machine of the model: {error}.") from error
        return peer

    def _greet(self, peer: _Peer) -> None:
        try:
            header = self._header(_HELLO, int(peer.has_greeted))
            peer.socket.send_multipart([header, self._layout], zmq.NOBLOCK)
        except zmq.Again:
            return
        # It has heard us, and this connection is the one on which it did.
        peer.is_joined = peer.has_greeted and peer.has_heard

    def _header(self, kind: int, number: int) -> bytes:
        return _HEADER.pack(kind, self._machines.generation, self._machine, number)

    def close(self) -> None:
        """Leave the group. May be called twice."""
        if self._context.closed:
            return
        self._is_ending.set()
        self._struct.loss = 1  # ends the wait for parts
        for thread in self._threads:
            thread.join()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for peer in self._peers.values():
            peer.socket.disable_monitor()
            peer.monitor.close()
            peer.socket.close(linger=0 if self._segment.is_lost else _LINGER_MS)
        self._inbox.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()

    # ---- threads --------------------------------------------------------------------------------------------------

    def _run(self, work: Any) -> None:
        try:
            work()
        finally:
            if not self._is_ending.is_set():
                self._segment.declare_lost()

    def _send_parts(self) -> None:
        exchange = 0
        while self._relay_own_parts(exchange):
            exchange = (exchange + 1) & 0xFFFFFFFF
        is_leaving = self._is_ending.is_set() and not self._segment.is_lost
        for peer in self._peers.values() if is_leaving else ():
            self._try_to_send(peer, [self._header(_FAREWELL, 0)])

    def _relay_own_parts(self, exchange: int) -> bool:
        """Send this machine's parts to all others. False when this group has ended."""
        sizes, parts = [], []
        for rank in self._own:
            size, num_bytes = c_int64(), c_int64()
            waited = self._library.wait_for_part(
                ctypes.byref(self._struct), rank, exchange, ctypes.byref(size), ctypes.byref(num_bytes)
            )
            if waited != 0:
                return False
            sizes.append(_SIZE.pack(size.value))
            address = self._library.part_of(ctypes.byref(self._struct), rank, exchange)
            parts.append(ctypes.string_at(address, num_bytes.value))
        message = [self._header(_PART, exchange) + b"".join(sizes), *parts]
        sent = [self._try_to_send(peer, message) for peer in self._peers.values()]
        return all(sent)

    def _try_to_send(self, peer: _Peer, message: list[bytes]) -> bool:
        if peer.has_left.is_set():
            return False
        try:
            peer.socket.send_multipart(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _receive(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        for peer in self._peers.values():
            poller.register(peer.monitor, zmq.POLLIN)
        while not self._is_ending.is_set() and not self._segment.is_lost:
            ready = dict(poller.poll(_POLL_MS))
            while self._inbox.poll(0):
                self._read(self._inbox.recv_multipart())
            for peer in self._peers.values():
                if peer.monitor in ready and any(event == zmq.EVENT_DISCONNECTED for event in _events(peer.monitor)):
                    peer.lost_at = peer.lost_at or time.monotonic() + _LEAVE_TIME_S
                if peer.lost_at is not None and time.monotonic() > peer.lost_at and not peer.has_left.is_set():
                    logger.error("The connection to machine %d of the model is lost.", peer.machine)
                    self._segment.declare_lost()
        # Ends the connections of the other machines: so they learn that this one has left.
        self._inbox.close()

    # ---- messages -------------------------------------------------------------------------------------------------

    def _read(self, frames: list[bytes]) -> None:
        """Read a message. What is not of this group changes nothing."""
        if not frames or len(frames[0]) < _HEADER.size:
            return
        kind, generation, machine, number = _HEADER.unpack_from(frames[0])
        peer = self._peers.get(machine)
        if peer is None:
            return
        if generation != self._machines.generation:
            if kind == _HELLO and generation > self._machines.generation and not self._threads:
                raise RankLostError(f"machine {machine} of the model is in a newer group than this one")
            return
        if kind == _HELLO:
            self._read_hello(peer, bool(number), frames[1:])
        elif kind == _PART:
            self._read_part(peer, number, frames[0][_HEADER.size :], frames[1:])
        elif kind == _FAREWELL:
            peer.has_left.set()

    def _read_hello(self, peer: _Peer, has_heard: bool, rest: list[bytes]) -> None:
        if self._threads:
            return
        if rest != [self._layout]:
            raise RankLostError(
                f"machine {peer.machine} of the model divides it otherwise than this one: "
                f"{b''.join(rest)[:200]!r}, not {self._layout!r}"
            )
        peer.has_greeted = True
        peer.has_heard |= has_heard
        self._greet(peer)

    def _read_part(self, peer: _Peer, exchange: int, sizes: bytes, parts: list[bytes]) -> None:
        fits = len(parts) == len(peer.ranks) and len(sizes) == _SIZE.size * len(parts)
        if not fits or exchange != peer.next_exchange or any(len(part) > self._segment.slot_bytes for part in parts):
            logger.warning("A message in the name of machine %d of the model is ignored.", peer.machine)
            return
        peer.next_exchange = (exchange + 1) & 0xFFFFFFFF
        for rank, (size,), part in zip(peer.ranks, _SIZE.iter_unpack(sizes), parts, strict=True):
            self._library.write_part(ctypes.byref(self._struct), rank, exchange, size, part, len(part))


class NetworkCollectives(SharedMemoryCollectives):
    """The collectives of a machine's first rank, which relays for all ranks of its machine. Owns segment and relay."""

    def __init__(
        self, library: ctypes.CDLL, segment: Segment, rank: int, timeout_s: float, relay: NetworkRelay
    ) -> None:
        super().__init__(library, segment, rank, timeout_s)
        self.relay = relay

    def enter(self, joined: SharedMemoryCollectives) -> None:
        super().enter(joined)
        assert isinstance(joined, NetworkCollectives)  # it is the machine's first rank in each group
        self.relay = joined.relay

    def close(self) -> None:
        self.relay.close()
        super().close()


def kernels_for_machines() -> Any:
    """The library of kernels, for relays and collectives. Raises StartupError where it cannot be built."""
    library = cpu_library(torch.float32)
    if library is None:
        raise StartupError("Ranks on several machines exchange by kernels in C++: install g++ or clang++.")
    return library


def _events(monitor: zmq.Socket[bytes]) -> Iterator[int]:
    while monitor.poll(0):
        yield int(parse_monitor_message(monitor.recv_multipart())["event"])


def _missing(peers: Sequence[_Peer], addresses: Sequence[str], timeout_s: float) -> str:
    named = [
        f"machine {peer.machine} at {addresses[peer.machine]}"
        + (" (its handshake failed: has it another cluster key?)" if peer.has_failed_handshake else "")
        for peer in peers
    ]
    return f"After {timeout_s:g} s these machines of the model have not joined: {', '.join(named)}."
