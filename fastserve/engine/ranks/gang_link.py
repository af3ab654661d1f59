"""The connection of a rank other than 0 to rank 0, over the network. No torch here."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from fastserve.distributed.gang import Gang
from fastserve.distributed.keys import CurveKeys
from fastserve.engine.ranks.gang_hub import (
    BEAT_INTERVAL_S,
    MAX_LEAVE_S,
    MAX_SILENCE_S,
    REPORT_INTERVAL_S,
    TCP_SILENCE_MS,
    is_alive,
)
from fastserve.engine.ranks.gang_messages import Beat, Formed, FromRank0, Join, Lost, RankFailed, Refused, ToRank0
from fastserve.engine.ranks.messages import RankCommand
from fastserve.engine.ranks.processes import RANK_LOST_EXIT_CODE
from fastserve.errors import EngineDeadError, StartupError

logger = logging.getLogger(__name__)

_JOIN_INTERVAL_S = 0.3
_POLL_MS = 100
_RECONNECT_MS = 200
_MAX_RECONNECT_MS = 1000
_FLUSH_MS = 1000


class RefusedError(StartupError):
    """Rank 0 does not take this rank, or does not come."""


class GangLink:
    """A thread owns the socket, so that beats go on while a step is computed. When the group is lost, the main thread
    leaves it and waits for a new one. Until this rank has its weights, its process ends with the group."""

    def __init__(self, gang: Gang, rank: int, keys: CurveKeys | None, settings: dict[str, str]) -> None:
        """`settings`: see same_settings.py. Raises StartupError when rank 0's machine cannot be reached."""
        self._gang = gang
        self._rank = rank
        self._join = Join(rank, settings, gang.own_ip(), os.getpid())
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromRank0).decode
        self._formed: queue.SimpleQueue[Formed | Refused] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[RankCommand | None] = queue.SimpleQueue()
        """None: the group is lost."""
        self._lock = threading.Lock()
        self._is_wanted = True
        """The main thread waits for a group, or has not been in one."""
        self._generation: int | None = None
        """Generation of the group that this rank is in."""
        self._entered: int | None = None
        """The last group that the main thread has entered."""
        self._left_generation = 0
        self._pid_of_rank_0 = 0
        self._loss: str | None = None
        self._abort: Callable[[], None] | None = None
        self._keeps_weights = False
        self._progress = (0, 0)
        self._failure: str | None = None
        self._end = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = self._socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, TCP_SILENCE_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, TCP_SILENCE_MS // 3)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, TCP_SILENCE_MS)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing waits for a connection, to come late
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.ROUTING_ID, os.urandom(16).replace(b"\0", b"\1"))
        if keys is not None:
            keys.secure_client(socket)
        socket.connect(gang.control_endpoint())
        self._thread = threading.Thread(target=self._run, name="rank 0", daemon=True)
        self._thread.start()

    def wait_formed(self) -> Formed:
        """Wait until all ranks have joined a new group. Raises RefusedError when this rank may not, or after the gang's
        timeout."""
        self._want()
        master = f"rank 0 ({self._gang.master.name}, {self._gang.control_endpoint()})"
        deadline = time.monotonic() + self._gang.timeout_s
        while True:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise RefusedError(
                    f"{master} has not formed a group within {self._gang.timeout_s / 60:g} minutes "
                    "(GANG_TIMEOUT_MIN). Its log says which ranks are missing; it must have the same cluster key."
                )
            try:
                answer = self._formed.get(timeout=min(remaining_s, REPORT_INTERVAL_S))
            except queue.Empty:
                logger.info("rank %d waits for %s, and for all other ranks", self._rank, master)
                continue
            if isinstance(answer, Refused):
                raise RefusedError(answer.message)
            self._entered = answer.generation
            return answer

    def _want(self) -> None:
        """Leave the group that this rank was in, and ask for a new one. The first group is asked for from the start."""
        with self._lock:
            if self._entered is None:
                return
            if self._generation is not None:
                self._left_generation, self._generation = self._generation, None
            self._entered = self._loss = self._abort = None
            for waiting in (self._commands, self._formed):
                while not waiting.empty():
                    waiting.get()
            self._is_wanted = True

    def receive(self) -> RankCommand:
        """The next command of rank 0. Raises EngineDeadError when the group is lost."""
        command = self._commands.get()
        if command is None:
            raise EngineDeadError(f"another rank of the model was lost ({self._loss})")
        return command

    def watch(self, abort: Callable[[], None]) -> None:
        """`abort` ends the exchanges of the group that has formed; it is called, in any thread, when the group is
        lost."""
        with self._lock:
            self._abort = abort
        if self.is_lost:
            abort()

    def keep_weights(self) -> None:
        """Call it once this rank has its weights: from now on this process goes on when the group is lost."""
        self._keeps_weights = True

    @property
    def is_lost(self) -> bool:
        """Whether the group is lost."""
        return self._loss is not None

    def note_progress(self, what: str, done: int, total: int) -> None:
        """A progress callback of loading: the next beat carries it."""
        self._progress = (done, total)

    def fail(self, message: str) -> None:
        """Report that this rank cannot start, and close."""
        self._failure = message
        self.close()

    def close(self) -> None:
        """May be called twice."""
        self._end.set()
        self._thread.join()
        self._context.destroy(linger=_FLUSH_MS)

    def _run(self) -> None:
        next_beat = heard_s = time.monotonic()
        while not self._end.is_set():
            if self._socket.poll(_POLL_MS):
                self._take(self._decode(self._socket.recv()))
                heard_s = time.monotonic()
            now = time.monotonic()
            if now >= next_beat:
                is_late = now - next_beat > BEAT_INTERVAL_S
                is_formed = self._generation is not None
                next_beat = now + (BEAT_INTERVAL_S if is_formed else _JOIN_INTERVAL_S)
                if is_formed:
                    self._send(Beat(*self._progress))
                elif self._is_wanted:
                    self._send(msgspec.structs.replace(self._join, left_generation=self._left_generation))
                if self._gang.part > 0 and not is_late and now - heard_s > MAX_SILENCE_S:
                    self._lose(f"rank 0 has been silent for {MAX_SILENCE_S:g} s")
            # Where rank 0 is on this machine and stopped, it is killed by its parent; silence alone shows nothing.
            if self._gang.part == 0 and self._generation is not None and not is_alive(self._pid_of_rank_0):
                self._lose(f"rank 0 (process {self._pid_of_rank_0}) has ended")
        if self._failure is not None:
            self._send(RankFailed(self._failure))

    def _take(self, message: FromRank0) -> None:
        match message:
            case Formed():
                with self._lock:
                    if self._is_wanted:
                        self._is_wanted, self._generation = False, message.generation
                        self._pid_of_rank_0 = message.pid
                        self._formed.put(message)
            case Refused():
                self._formed.put(message)
            case Lost(reason):
                self._lose(reason)
            case Beat():
                pass
            case _:
                if self._generation is not None:
                    self._commands.put(message)

    def _send(self, message: ToRank0) -> None:
        try:
            self._socket.send(self._encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return  # not connected: the next one will be sent

    def _lose(self, reason: str) -> None:
        """The group is lost. One that is not in a group has nothing to lose."""
        with self._lock:
            if self._generation is None or self._end.is_set():
                return
            self._left_generation, self._generation = self._generation, None
            self._loss = reason
            abort = self._abort
        if not self._keeps_weights:
            logger.error("rank %d ends, to be started again: %s", self._rank, reason)
            os._exit(RANK_LOST_EXIT_CODE)
        logger.error("rank %d keeps its weights and waits for a new group: %s", self._rank, reason)
        if abort is not None:
            abort()
        self._commands.put(None)
        threading.Thread(target=self._end_unless_left, args=(reason,), daemon=True).start()

    def _end_unless_left(self, reason: str) -> None:
        deadline = time.monotonic() + MAX_LEAVE_S
        while self._loss is reason and not self._end.is_set():
            if time.monotonic() > deadline:
                logger.error("rank %d has not ended its step for %g s and ends", self._rank, MAX_LEAVE_S)
                os._exit(RANK_LOST_EXIT_CODE)
            time.sleep(_POLL_MS / 1000)
