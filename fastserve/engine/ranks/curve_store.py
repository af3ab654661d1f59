"""Where the ranks of several machines meet to form a process group: torch's key-value store, over ZeroMQ with CURVE.

torch's own TCPStore listens on all addresses and asks nobody who they are. What is stored here is what a rank needs to
connect to the others, such as NCCL's unique id.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist
import zmq

from fastserve.distributed.keys import CurveAuthenticator, CurveKeys
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.errors import StartupError

_MAX_KEYS = 65536
_MAX_MESSAGE_BYTES = 1 << 20
_POLL_MS = 100
_RETRY_S = 0.01
"""Between two questions for a key that is not there yet."""
_ANSWER_S = 5.0
"""Longest wait for an answer of the server: it answers at once."""
_HEARTBEAT_INTERVAL_MS = 1000
_HEARTBEAT_TIMEOUT_MS = 3000
_HERE, _MISSING, _FULL = b"1", b"0", b"F"


class StoreServer:
    """Holds the keys, in a thread of rank 0. Must be closed, after its clients."""

    def __init__(self, keys: CurveKeys | None, address: str) -> None:
        """Bind `address` (host:port; port 0: any free one). `keys`: None on networks where nobody else is.

        Raises StartupError when the address cannot be bound."""
        self._values: dict[bytes, bytes] = {}
        self._end = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = None if keys is None else CurveAuthenticator(self._context, keys)
        self._socket = _socket(self._context, zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IPV6, int(address.startswith("[")))
        if keys is not None:
            keys.secure_server(self._socket)
        try:
            self._socket.bind(f"tcp://{address}")
        except zmq.ZMQError as error:
            self._release()
            raise StartupError(f"Cannot listen at {address} for the other ranks of the model: {error}.") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        operations = {
            b"set": self._set,
            b"get": self._get,
            b"add": self._add,
            b"swap": self._swap,
            b"del": self._delete,
        }
        while not self._end.is_set():
            if not self._socket.poll(_POLL_MS):
                continue
            frames = self._socket.recv_multipart()
            if len(frames) == 6 and frames[2] in operations:
                identity, number, operation, *arguments = frames
                with contextlib.suppress(ValueError):  # no number
                    self._socket.send_multipart([identity, number, *operations[operation](*arguments)])

    def _set(self, key: bytes, value: bytes, _: bytes) -> tuple[bytes, bytes]:
        if key not in self._values and len(self._values) >= _MAX_KEYS:
            return _FULL, b""
        self._values[key] = value
        return _HERE, value

    def _get(self, key: bytes, _: bytes, __: bytes) -> tuple[bytes, bytes]:
        value = self._values.get(key)
        return (_MISSING, b"") if value is None else (_HERE, value)

    def _add(self, key: bytes, amount: bytes, _: bytes) -> tuple[bytes, bytes]:
        return self._set(key, b"%d" % (int(self._values.get(key, b"0")) + int(amount)), b"")

    def _swap(self, key: bytes, expected: bytes, desired: bytes) -> tuple[bytes, bytes]:
        """Set it if it is as expected, or is expected to be missing (empty)."""
        found = self._values.get(key, b"")
        return self._set(key, desired, b"") if found == expected else (_HERE, found)

    def _delete(self, key: bytes, _: bytes, __: bytes) -> tuple[bytes, bytes]:
        return (_MISSING, b"") if self._values.pop(key, None) is None else (_HERE, b"")

    def close(self) -> None:
        """May be called twice."""
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        self._release()

    def _release(self) -> None:
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()


class CurveStore(dist.Store):  # type: ignore[misc]
    """A rank's access to the keys. Threads of a process group call it too. Must be closed."""

    def __init__(
        self, keys: CurveKeys | None, address: str, timeout_s: float, is_lost: Callable[[], bool] = lambda: False
    ) -> None:
        """`address`: of the server. `timeout_s`: longest wait for a key that another rank sets. `is_lost`: whether
        the ranks that should meet here are known to be lost.

        Its methods raise RankLostError when there is no answer, no such key in time, or after `abort`."""
        super().__init__()
        self._timeout_s = timeout_s
        self._is_lost = is_lost
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._is_answered = False
        self._is_aborted = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _socket(self._context, zmq.DEALER)
        self._socket.setsockopt(zmq.IPV6, 1)
        if keys is not None:
            keys.secure_client(self._socket)
        try:
            self._socket.connect(f"tcp://{address}")
        except zmq.ZMQError as error:
            self.close()
            raise StartupError(f"{address} is no address of rank 0 of the model: {error}.") from error
        self._address = address

    def abort(self) -> None:
        """End all waits. Any thread may call it."""
        self._is_aborted.set()

    def close(self) -> None:
        """May be called twice."""
        self.abort()
        with self._lock:
            self._context.destroy(linger=0)

    # ---- torch's contract of a store ------------------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(b"set", key, _bytes(value))

    def get(self, key: str) -> bytes:
        return self._wait_for(key, self._timeout_s)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        deadline = time.monotonic() + (self._timeout_s if timeout is None else timeout.total_seconds())
        for key in keys:
            self._wait_for(key, deadline - time.monotonic())

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._ask(b"get", key) is not None for key in keys)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(b"add", key, b"%d" % amount) or 0)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._ask(b"swap", key, _bytes(expected), _bytes(desired)) or b""

    def delete_key(self, key: str) -> bool:
        return self._ask(b"del", key) is not None

    def has_extended_api(self) -> bool:
        return False

    def clone(self) -> CurveStore:
        return self

    # ---- questions ------------------------------------------------------------------------------------------------

    def _wait_for(self, key: str, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while (found := self._ask(b"get", key)) is None:
            if time.monotonic() >= deadline:
                raise RankLostError(f"Another rank of the model did not come within {timeout_s:.3g} s (it sets {key}).")
            if self._is_aborted.wait(_RETRY_S) or self._is_lost():
                raise RankLostError("The wait for the other ranks of the model was given up: one is lost.")
        return found

    def _ask(self, operation: bytes, key: str, first: bytes = b"", second: bytes = b"") -> bytes | None:
        """The answer's value; None: there is no such key."""
        with self._lock:
            number = b"%d" % next(self._numbers)
            # Rank 0 may begin to listen after this rank's first question.
            deadline = time.monotonic() + (_ANSWER_S if self._is_answered else self._timeout_s)
            if self._is_aborted.is_set():
                raise RankLostError("The process group of the model's ranks has ended.")
            is_sent = False
            while (left_s := deadline - time.monotonic()) > 0 and not self._is_aborted.is_set() and not self._is_lost():
                # It cannot be sent while the connection is refused or away.
                if not self._socket.poll(min(_POLL_MS, int(1000 * left_s) + 1), zmq.POLLIN if is_sent else zmq.POLLOUT):
                    continue
                if not is_sent:
                    self._socket.send_multipart([number, operation, key.encode(), first, second])
                    is_sent = True
                    continue
                answered, status, value = self._socket.recv_multipart()
                if answered != number:
                    continue  # to a question that was given up
                if status == _FULL:
                    raise RankLostError(f"The store in which ranks meet is full ({_MAX_KEYS} keys).")
                self._is_answered = True
                return value if status == _HERE else None
        raise RankLostError(f"Rank 0 of the model, at {self._address}, does not answer (has it another cluster key?).")


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    return socket


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
