"""Rank 0's end of the connections to all other ranks: it waits for them, sends them plans, and notices their loss.

Ranks on other machines connect by tcp, and authenticate with keys that are derived from the cluster key. A thread owns
the socket, so that beats go on while a step is computed. No torch here.

The loss of a rank ends the group: exchanges are aborted, and rank 0 notifies all ranks, which join a new group. Before
the model has been ready once, rank 0 replaces its own process instead.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import psutil
import zmq

from fastserve.distributed.gang import Gang, endpoint
from fastserve.distributed.keys import CurveAuthenticator, CurveKeys
from fastserve.engine.ranks.gang_messages import Beat, Formed, FromRank0, Join, Lost, RankFailed, Refused, ToRank0
from fastserve.engine.ranks.messages import EndRank, RankCommand
from fastserve.engine.ranks.processes import RANK_LOST_EXIT_CODE
from fastserve.engine.ranks.same_settings import difference
from fastserve.errors import EngineDeadError, StartupError
from fastserve.observability.text import printable

logger = logging.getLogger(__name__)

BEAT_INTERVAL_S = 0.5
MAX_SILENCE_S = 3.0
"""Silence of another rank after which it is lost."""
REPORT_INTERVAL_S = 10.0
"""Time between two lines in the log about ranks that are missing."""
TCP_SILENCE_MS = 3000
"""A connection whose peer does not answer for this time is closed, and opened again by the member."""
_MAX_MESSAGE_BYTES = 1 << 20
_MAX_MESSAGES_AT_ONCE = 1000
_POLL_MS = 100
_FLUSH_S = 0.2
_FAILURE_S = 10.0
"""Time that the main thread may take to end after a rank has failed."""
MAX_LEAVE_S = 15.0
"""Time that a rank's main thread may take to leave a lost group, in which it may compute a step to its end. A rank that
takes longer is started again."""
_MAX_RETURN_S = MAX_LEAVE_S + 2.0
"""Time that a rank of this machine may take to join again. One that holds Python's lock cannot end itself."""


@dataclass(slots=True)
class _Member:
    identity: bytes
    ip: str
    pid: int
    heard_s: float
    progress: tuple[int, int] = (0, 0)


class GangHub:
    """Must be closed, before the process's other ZeroMQ contexts are of no use to it."""

    def __init__(
        self,
        gang: Gang,
        keys: CurveKeys | None,
        settings: dict[str, str],
        restart: Callable[[], None] | None = None,
    ) -> None:
        """`settings`: see same_settings.py. `restart`: begins the start of this process anew when a rank is lost before
        the model serves. Raises StartupError when the port cannot be bound."""
        self._gang = gang
        self._settings = settings
        # Other ranks' and this one's devices are not yet distributed in it.
        environ = dict(os.environ)
        self._restart = restart or (lambda: _start_again(environ))
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToRank0).decode
        self._members: dict[int, _Member] = {}
        self._refusals: dict[int, str] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_wanted = False
        """The main thread waits for all ranks."""
        self._formed: Formed | None = None
        self._failure: str | None = None
        self._abort: Callable[[], None] = _nothing
        self._keeps_weights = False
        self._is_serving = False
        self._loss: str | None = None
        """Why the group was lost that the main thread has not left yet."""
        self._returning: dict[int, float] = {}
        """Ranks of this machine that have not joined again since a loss: their latest time by process id."""
        self._leaving: str | None = None
        """Why the main thread wants to leave the group."""
        self._end = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = None if keys is None else CurveAuthenticator(self._context, keys)
        self._router = self._context.socket(zmq.ROUTER)
        try:
            self._bind(keys)
        except StartupError:
            self._release()
            raise
        commands = f"inproc://commands-{id(self)}"
        self._from_main = self._context.socket(zmq.PAIR)
        self._from_main.set_hwm(0)
        self._from_main.bind(commands)
        self._commands = self._context.socket(zmq.PAIR)
        self._commands.set_hwm(0)
        self._commands.connect(commands)
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    def _bind(self, keys: CurveKeys | None) -> None:
        router = self._router
        router.set_hwm(0)
        router.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a rank whose old connection hangs may come back
        router.setsockopt(zmq.HEARTBEAT_IVL, TCP_SILENCE_MS // 3)
        router.setsockopt(zmq.HEARTBEAT_TIMEOUT, TCP_SILENCE_MS)
        router.setsockopt(zmq.IPV6, 1)
        if keys is not None:
            keys.secure_server(router)
        gang = self._gang
        if gang.is_one_machine:
            router.bind(gang.control_endpoint())
            return
        for ip in dict.fromkeys((gang.master.ip, gang.own_ip())):
            try:
                router.bind(endpoint(ip, gang.control_port))
            except zmq.ZMQError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
                    continue  # behind address translation, the file names another address than this machine knows
                raise StartupError(
                    f"Port {gang.control_port} on {ip}, where the other ranks join (START_PORT + 1), cannot be bound: "
                    f"{error}. Choose another START_PORT."
                ) from error
            return
        raise StartupError(
            f"{gang.master.ip} in DISTRIBUTE_CONFIG_FILE is no address of this machine, which is part 0."
        )

    # ---- main thread --------------------------------------------------------------------------------------------

    def wait_formed(self) -> Formed:
        """Wait until all ranks have joined a new group. Raises StartupError after the gang's timeout."""
        deadline = time.monotonic() + self._gang.timeout_s
        next_report = 0.0
        with self._changed:
            self._loss = None
            self._abort = _nothing
            self._is_wanted = True
            while self._formed is None:
                now = time.monotonic()
                if self._failure is not None:
                    raise StartupError(self._failure)
                if now >= deadline:
                    raise StartupError(
                        f"{self._describe_missing()} after {self._gang.timeout_s / 60:g} minutes (GANG_TIMEOUT_MIN). "
                        "Start the same command on every machine, with its own WORLD_RANK and START_PORT."
                    )
                if now >= next_report and len(self._members) < self._gang.size - 1:
                    next_report = now + REPORT_INTERVAL_S
                    logger.info("waiting: %s", self._describe_missing())
                self._changed.wait(min(deadline, max(next_report, now + 0.5)) - now)
            return self._formed

    def _describe_missing(self) -> str:
        missing = [rank for rank in range(1, self._gang.size) if rank not in self._members]
        shown = ", ".join(self._gang.name_of(rank) for rank in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        reasons = "".join(f"; refused: {self._refusals[rank]}" for rank in missing if rank in self._refusals)
        return f"missing {shown}{more}{reasons}"

    def send(self, command: RankCommand, rank: int | None = None) -> None:
        """Send a command to each rank, or to one, without waiting. For the main thread."""
        self._commands.send_multipart([b"" if rank is None else b"%d" % rank, self._encode(command)])

    def watch(self, abort: Callable[[], None]) -> None:
        """`abort` ends the exchanges of the group that has formed; it is called, in any thread, when a rank is lost."""
        with self._lock:
            self._abort = abort
            is_lost = self._loss is not None or self._failure is not None
        if is_lost:
            abort()

    def serving(self, *, keeps_weights: bool) -> None:
        """Call it once the model is ready: from now on this process goes on when another rank is lost, if it keeps its
        weights, and ends if it does not."""
        self._is_serving = True
        self._keeps_weights = keeps_weights

    @property
    def is_lost(self) -> bool:
        """Whether a rank of the group was lost."""
        return self._loss is not None or self._failure is not None

    def require_group(self) -> None:
        """Raises EngineDeadError when a rank of the group was lost."""
        if self._loss is not None:
            raise EngineDeadError(self._loss)

    def leave(self, reason: str) -> None:
        """Leave the group, whose exchanges have failed, if it is not known yet that it is lost."""
        with self._changed:
            if self._formed is None:
                return
            self._leaving = reason
            while self._formed is not None:
                self._changed.wait(_POLL_MS / 1000)

    def reason_of_failed_start(self) -> str | None:
        """Message for the user when a rank could not start; None when none failed."""
        return self._failure

    def progress(self) -> tuple[int, int]:
        """Bytes of the other ranks that are loaded, and that are to be loaded as far as they are known."""
        with self._lock:
            found = [member.progress for member in self._members.values()]
        return sum(done for done, _ in found), sum(total for _, total in found)

    def end_ranks(self) -> None:
        """Have the other ranks of the group end, and close."""
        self.send(EndRank())
        self.close()

    def close(self) -> None:
        """Leave the other ranks, which then wait for a new rank 0. May be called twice."""
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        self._release()

    def _release(self) -> None:
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.destroy(linger=int(1000 * _FLUSH_S))

    # ---- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._from_main, zmq.POLLIN)
        next_beat = 0.0
        while True:
            ready = dict(poller.poll(_POLL_MS))
            if self._from_main in ready:
                self._pass_on_commands()
            elif self._end.is_set():
                return
            if self._router in ready:
                self._take_all()
            now = time.monotonic()
            self._check_processes()
            if self._leaving is not None:
                self._lose(self._leaving)
            if now >= next_beat:
                # A late beat means that this process was stopped or starved, and that members' messages wait unread.
                is_late = next_beat > 0 and now - next_beat > BEAT_INTERVAL_S
                next_beat = now + BEAT_INTERVAL_S
                self._pass_on(self._encode(Beat()))
                if not is_late:
                    self._check(now)

    def _take_all(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_MAX_MESSAGES_AT_ONCE):
                self._take(*self._router.recv_multipart(zmq.NOBLOCK)[:2])

    def _pass_on_commands(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                rank, command = self._from_main.recv_multipart(zmq.NOBLOCK)
                self._pass_on(command, int(rank) if rank else None)

    def _pass_on(self, message: bytes, to: int | None = None) -> None:
        for rank, member in self._members.items():
            if to is None or rank == to:
                self._router.send_multipart([member.identity, message])

    def _answer(self, identity: bytes, message: FromRank0) -> None:
        self._router.send_multipart([identity, self._encode(message)])

    def _take(self, identity: bytes, content: bytes = b"") -> None:
        try:
            message = self._decode(content)
        except msgspec.MsgspecError:
            logger.warning("a message of an unknown kind came to the port where ranks join, and is left out")
            return
        rank = next((rank for rank, member in self._members.items() if member.identity == identity), None)
        match message:
            case Join():
                self._join(identity, message)
            case Beat() if rank is not None:
                self._members[rank].heard_s = time.monotonic()
                self._members[rank].progress = message.num_bytes_done, message.num_bytes
            case Beat():
                self._answer(identity, Lost("rank 0 has been started again"))
            case RankFailed(text) if rank is not None:
                self._fail(f"{self._gang.name_of(rank)}: {text}")
            case RankFailed():
                pass

    def _join(self, identity: bytes, message: Join) -> None:
        rank, now = message.rank, time.monotonic()
        if not 1 <= rank < self._gang.size:
            self._answer(identity, Refused(f"There is no rank {rank}: ranks are 0 to {self._gang.size - 1}."))
            return
        self._returning.pop(message.pid, None)
        known = self._members.get(rank)
        if known is not None and known.identity == identity:
            known.heard_s = now
            if self._formed is not None and message.left_generation == self._formed.generation:
                self._lose(f"{self._gang.name_of(rank)} has left the group")
            return
        different = difference(message.settings, self._settings)
        if different is not None:
            text = f"{self._gang.name_of(rank)} differs from rank 0: {different}. Start all machines with the same."
            if self._refusals.get(rank) != text:
                logger.error("%s", text)
            self._refusals[rank] = text
            self._answer(identity, Refused(text))
            return
        if self._formed is not None:
            self._lose(f"{self._gang.name_of(rank)} has been started again")
            return
        with self._changed:
            self._refusals.pop(rank, None)
            self._members[rank] = _Member(identity, message.ip, message.pid, now)
            logger.info("%s has joined from %s", self._gang.name_of(rank), printable(message.ip, 60))
        self._form()

    def _form(self) -> None:
        with self._changed:
            if not self._is_wanted or self._formed is not None or len(self._members) < self._gang.size - 1:
                return
            ips = [self._gang.own_ip(), *(self._members[rank].ip for rank in range(1, self._gang.size))]
            self._formed = Formed(time.time_ns() // 1_000_000, tuple(ips), os.getpid())
            logger.info("all %d ranks have joined", self._gang.size)
            self._pass_on(self._encode(self._formed))
            self._changed.notify_all()

    def _check_processes(self) -> None:
        """Notice at once when a rank of this machine has ended."""
        for rank in self._gang.local_ranks[1:]:
            member = self._members.get(rank)
            if member is not None and self._formed is not None and not is_alive(member.pid):
                self._lose(f"{self._gang.name_of(rank)} (process {member.pid}) has ended")

    def _end_missing_ranks(self, now: float) -> None:
        for pid in [pid for pid, latest_s in self._returning.items() if now > latest_s]:
            del self._returning[pid]
            # Members say what their process is.
            if is_sibling(pid):
                logger.error("The rank with process %d has not left the lost group and is killed.", pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _check(self, now: float) -> None:
        self._end_missing_ranks(now)
        # A rank of this machine that is stopped is killed by its parent; silence alone shows nothing.
        others = [(rank, member) for rank, member in self._members.items() if rank not in self._gang.local_ranks]
        silent = [rank for rank, member in others if now - member.heard_s > MAX_SILENCE_S]
        if not silent:
            self._form()  # the main thread may have begun to wait
            return
        if self._formed is not None:
            self._lose(f"{self._gang.name_of(silent[0])} has been silent for {MAX_SILENCE_S:g} s")
            return
        with self._changed:
            for rank in silent:
                logger.warning("%s is gone", self._gang.name_of(rank))
                del self._members[rank]

    def _lose(self, reason: str) -> None:
        """A rank of the group is lost: all others leave it, to join again."""
        if self._end.is_set():
            return
        self._pass_on(self._encode(Lost(reason)))
        if not self._keeps_weights and self._is_serving:
            logger.error("The engine ends, to be started again with all its ranks: %s.", reason)
            time.sleep(_FLUSH_S)
            os._exit(RANK_LOST_EXIT_CODE)
        if not self._keeps_weights and self._gang.is_one_machine:
            self._fail(f"The model could not be started: {reason}.")
            return
        if not self._keeps_weights:
            logger.error("The ranks of the model begin anew: %s.", reason)
            time.sleep(_FLUSH_S)
            self._restart()
            return
        with self._changed:
            self._leaving = None
            if self._formed is None:
                return
            logger.error("A rank of the model is lost, the others keep their weights and wait: %s.", reason)
            self._formed, self._is_wanted = None, False
            own = [self._members[rank] for rank in self._gang.local_ranks[1:] if rank in self._members]
            self._returning = {member.pid: time.monotonic() + _MAX_RETURN_S for member in own}
            self._members.clear()
            self._loss = reason
            abort = self._abort
            self._changed.notify_all()
        abort()
        threading.Thread(target=self._end_unless_left, args=(reason,), daemon=True).start()

    def _end_unless_left(self, reason: str) -> None:
        deadline = time.monotonic() + MAX_LEAVE_S
        while self._loss is reason and not self._end.is_set():
            if time.monotonic() > deadline:
                logger.error("A step has not ended for %g s, so this process ends, to be started again.", MAX_LEAVE_S)
                os._exit(RANK_LOST_EXIT_CODE)
            time.sleep(_POLL_MS / 1000)

    def _fail(self, message: str) -> None:
        """A rank cannot start. One that comes to a group that has its weights is started again, and waited for."""
        if self._keeps_weights:
            self._lose(message)
            return
        if self._failure is not None:
            return
        with self._changed:
            self._failure = message
            abort = self._abort
            self._changed.notify_all()
        logger.error("%s", message)
        abort()
        # The main thread may wait for something else.
        threading.Thread(target=self._end_late, daemon=True).start()

    def _end_late(self) -> None:
        if not self._end.wait(_FAILURE_S):
            os._exit(1)


def _nothing() -> None:
    pass


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_sibling(pid: int) -> bool:
    """Whether a process is another child of this one's parent."""
    try:
        return pid != os.getpid() and psutil.Process(pid).ppid() == os.getppid()
    except psutil.Error:
        return False


def _start_again(environ: dict[str, str]) -> None:
    """Replace this process, which has not served yet, by one with the same parent and arguments."""
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
    os._exit(RANK_LOST_EXIT_CODE)
