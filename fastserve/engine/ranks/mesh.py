"""Collectives between ranks that share no memory: every rank sends its part to every other one, over ZeroMQ.

With keys, all of it is encrypted, and nobody else can connect.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import torch
import zmq

from fastserve.distributed.gang import endpoint
from fastserve.distributed.keys import CurveAuthenticator, CurveKeys
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.errors import StartupError

_HELLO = -1
_HELLO_INTERVAL_S = 0.1


class _Header(msgspec.Struct, frozen=True, array_like=True):
    generation: int
    rank: int
    exchange: int
    """Number of the exchange, from 0; _HELLO while ranks meet."""
    shape: tuple[int, ...]
    """Of the part; of a hello: the ranks that its sender has heard of."""


class MeshCollectives:
    """Each rank binds one socket, to which all others connect. Close it in the thread that uses it."""

    def __init__(
        self, addresses: Sequence[tuple[str, int]], rank: int, generation: int, keys: CurveKeys | None, timeout_s: float
    ) -> None:
        """`addresses`: ip and port of each rank. `generation`: messages of other generations are left out. `timeout_s`:
        longest wait for another rank. Raises StartupError when this rank's port cannot be bound."""
        self.rank = rank
        self.size = len(addresses)
        self._generation = generation
        self._exchange = 0
        self._received: dict[tuple[int, int], tuple[_Header, bytes]] = {}
        """Parts that came before this rank needed them, by exchange and rank."""
        self._decode = msgspec.msgpack.Decoder(_Header).decode
        self._timeout_s = timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = None if keys is None else CurveAuthenticator(self._context, keys)
        self._incoming = self._socket(zmq.PULL)
        if keys is not None:
            keys.secure_server(self._incoming)
        try:
            self._incoming.bind(endpoint(*addresses[rank]))
        except zmq.ZMQError as error:
            self.close()
            raise StartupError(
                f"{endpoint(*addresses[rank])}, where rank {rank} exchanges tensors, cannot be bound: {error}. Ports "
                "from START_PORT + 1 to START_PORT + 2 + LOCAL_WORLD_SIZE must be free."
            ) from error
        self._outgoing: list[zmq.Socket[bytes]] = []
        for other in range(self.size):
            if other == rank:
                continue
            socket = self._socket(zmq.PUSH)
            if keys is not None:
                keys.secure_client(socket)
            socket.connect(endpoint(*addresses[other]))
            self._outgoing.append(socket)
        self._meet()

    def _meet(self) -> None:
        """Say hello until every other rank has answered: what is sent first may reach a rank of an earlier group, which
        ends."""
        heard, ready = {self.rank}, {self.rank}
        deadline, next_hello = time.monotonic() + self._timeout_s, 0.0
        while len(ready) < self.size:
            if time.monotonic() >= next_hello:
                next_hello = time.monotonic() + _HELLO_INTERVAL_S
                self._send(_Header(self._generation, self.rank, _HELLO, tuple(heard)), b"")
            header = self._receive(deadline, next_hello)
            if header is None:
                continue
            heard.add(header.rank)
            # A rank that goes on to exchange has heard of all.
            if header.exchange != _HELLO or self.rank in header.shape:
                ready.add(header.rank)
        self._send(_Header(self._generation, self.rank, _HELLO, tuple(heard)), b"")

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.linger = 0
        socket.setsockopt(zmq.IPV6, 1)
        return socket

    def set_timeout(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def all_reduce(self, partial: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        parts = self._gather(partial.to(device="cpu", dtype=torch.float32))
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total.to(device=partial.device, dtype=out_dtype or partial.dtype)

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._gather(values.cpu())).amax(dim=0).to(values.device)

    def all_gather(self, part: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._gather(part.cpu()), dim).to(part.device)

    def barrier(self) -> None:
        self._gather(torch.zeros(0))

    def close(self) -> None:
        """Leave the group. May be called twice."""
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.destroy(linger=0)

    def _gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """The parts of all ranks, which have the same dtype."""
        part = part.detach().contiguous()
        number, self._exchange = self._exchange, self._exchange + 1
        data = part.view(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b""
        self._send(_Header(self._generation, self.rank, number, tuple(part.shape)), data)
        deadline = time.monotonic() + self._timeout_s
        parts: list[torch.Tensor] = []
        for rank in range(self.size):
            if rank == self.rank:
                parts.append(part)
                continue
            while (number, rank) not in self._received:
                self._receive(deadline)
            found, content = self._received.pop((number, rank))
            flat = torch.frombuffer(bytearray(content), dtype=part.dtype) if content else part.new_empty(0)
            parts.append(flat.view(found.shape))
        return parts

    def _send(self, header: _Header, data: bytes) -> None:
        head = msgspec.msgpack.encode(header)
        for socket in self._outgoing:
            socket.send_multipart([head, data])

    def _receive(self, deadline: float, until_s: float | None = None) -> _Header | None:
        """Keep the next message of this generation; None if there was none until `until_s`."""
        now = time.monotonic()
        if now >= deadline:
            raise RankLostError(
                f"A step ended early: another rank of the model did not answer within {self._timeout_s:g} s."
            )
        remaining_s = (deadline if until_s is None else min(deadline, until_s)) - now
        if not self._incoming.poll(max(1, int(1000 * remaining_s))):
            return None
        head, content = self._incoming.recv_multipart()
        header = self._decode(head)
        if header.generation != self._generation:
            return None
        if header.exchange != _HELLO:
            self._received[header.exchange, header.rank] = header, content
        return header
